"""``kvoffload serve``: the OpenAI dialect over HTTP, and a scheduler that gives every request a turn at one model.

The only package beside the storage's engines that may use asyncio. Importing it loads neither torch nor FastAPI.
"""
