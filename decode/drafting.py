"""What a decode worker drafts with, by what its engine has."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.decode.chain import ChainDrafter
from headrace.decode.chain_choice import DeviceHead, ThreadChain
from headrace.decode.controller import HeadCost
from headrace.decode.head import HeadDrafter
from headrace.decode.model import ModelDrafter
from headrace.decode.ngram import NgramDrafter
from headrace.decode.speculator import Speculator
from headrace.decode.step_cost import StepCost
from headrace.engine.engine import Engine
from headrace.engine.step_timing import StepSeconds


def chain_drafter(engine: Engine) -> ChainDrafter | None:
    """What drafts on the engine's thread after a step, if something does: on a GPU a head does within one."""
    if engine.graph_head is not None or engine.device.type != "cpu":
        return None
    if engine.draft is not None:
        return ModelDrafter(engine)
    return HeadDrafter(engine) if engine.head is not None else None


def new_speculator(engine: Engine, seconds: StepSeconds, of_token: Mapping[int, float]) -> Speculator:
    """A worker's, at its start. `of_token`: what a token more takes (see `ChainDrafter.time_tokens`) of what drafts
    token after token, on the engine's thread or on the device; empty where nothing does.
    """
    cost = StepCost(seconds.plain, engine.config.max_num_seqs, seconds.drafted, seconds.ahead)
    drafter = chain_drafter(engine)
    chain: DeviceHead | ThreadChain | None = None
    if engine.graph_head is not None and of_token:
        chain = DeviceHead(HeadCost(of_token, engine.graph_head.max_requests))
    elif drafter is not None and of_token:
        chain = ThreadChain(drafter, HeadCost(of_token))
    return Speculator(NgramDrafter(), cost, engine.max_model_len, chain)
