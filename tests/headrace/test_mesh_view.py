"""Fill, rates and shares of a mesh, from what its members published at two moments."""

from __future__ import annotations

import json

from headrace.mesh_view import Moment, view_mesh
from headrace.messages.finished import FinishedRequest
from headrace.registry import Member, Tier
from tests.members import member


def _member(name: str, tier: Tier, epoch: int = 5 * 10**9, **stats: float) -> Member:
    return member(name, tier, epoch, version="1", model="tiny", stats=stats)


def test_rates_come_from_counters_at_two_moments() -> None:
    """And shares from what came between the two."""
    before = Moment(
        100.0, [_member("d0", "decode", generation_tokens_total=50, decode_steps_total=1, decode_step_requests_total=9)]
    )
    now = Moment(
        102.0,
        [
            _member(
                "d0",
                "decode",
                generation_tokens_total=250,
                decode_steps_total=11,
                decode_step_requests_total=49,
                kv_pages_in_use=3,
                kv_pages_total=12,
                requests_running=4,
            )
        ],
    )
    view = view_mesh(now, before).members[0]
    assert (view.tokens_per_second, view.batch_size, view.fill, view.running) == (100.0, 4.0, 0.25, 4)
    assert view.uptime_seconds == 97.0


def test_a_restarted_worker_has_no_rate_yet() -> None:
    """Its counters began anew."""
    before = Moment(1.0, [_member("p0", "prefill", epoch=1, prompt_tokens_total=1000)])
    now = Moment(2.0, [_member("p0", "prefill", epoch=2, prompt_tokens_total=10)])
    assert view_mesh(now, before).members[0].tokens_per_second is None


def test_a_share_without_news_is_the_one_since_the_start() -> None:
    """An idle worker's hit rate does not vanish; one that never looked has none."""
    looked = [_member("p0", "prefill", prefix_cache_queries_total=100, prefix_cache_hits_total=25)]
    assert view_mesh(Moment(2.0, looked), Moment(1.0, looked)).members[0].prefix_hit_rate == 0.25
    assert view_mesh(Moment(2.0, [_member("p0", "prefill")])).members[0].prefix_hit_rate is None


def test_acceptance_is_that_of_whichever_drafter_there_is() -> None:
    """Its name is part of the counters'."""
    drafts = {"speculation_head_drafted_total": 8.0, "speculation_head_accepted_total": 6.0}
    assert view_mesh(Moment(2.0, [_member("d0", "decode", **drafts)])).members[0].acceptance_rate == 0.75


def test_the_view_is_json_in_a_fixed_order() -> None:
    """Gateways first, newest requests first."""
    members = [_member("d1", "decode"), _member("p0", "prefill"), _member("g0", "gateway"), _member("d0", "decode")]
    requests = [FinishedRequest(id=f"r{at}", kind="chat", outcome="ok", started_at=at) for at in (1.0, 3.0, 2.0)]
    view = json.loads(json.dumps(view_mesh(Moment(9.0, members), queued=2, requests=requests).as_json()))
    assert [member["id"] for member in view["members"]] == ["g0", "p0", "d0", "d1"]
    assert [request["id"] for request in view["requests"]] == ["r3.0", "r2.0", "r1.0"]
    assert (view["queued"], view["models"]) == (2, ["tiny"])
