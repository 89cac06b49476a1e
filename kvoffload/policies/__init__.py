"""Policies: published systems as wrappers around any selector, completion and tier. Adding one takes its file and its
name in the union below."""

from typing import Annotated

from pydantic import Field

from kvoffload.policies.hshare import HsharePolicyConfig
from kvoffload.policies.prhs import PrhsPolicyConfig
from kvoffload.policies.refresh import RefreshPolicyConfig
from kvoffload.policies.resa import ResaPolicyConfig
from kvoffload.policies.retro import RetroPolicyConfig
from kvoffload.policies.tokenselect import TokenSelectPolicyConfig

PolicyConfig = Annotated[
    PrhsPolicyConfig
    | HsharePolicyConfig
    | TokenSelectPolicyConfig
    | RetroPolicyConfig
    | ResaPolicyConfig
    | RefreshPolicyConfig,
    Field(discriminator="kind"),
]
