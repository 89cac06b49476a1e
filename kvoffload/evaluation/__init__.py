"""What a policy costs in quality: measurements from the real runtime, with its real tiers and its real meter."""
