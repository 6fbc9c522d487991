"""F12 and F13: a warm cache, when no request is allowed, and when the hub never answers.

Official names are loaded from an organisation of the hub that mirrors them; TiC, of which there are
no official weights, from a repository; L2ViT, whose authors release files, from a URL as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor

import backbones  # noqa: F401
from tests.backbones.models import VARIANTS
from tests.faults.client import digest
from tests.faults.hub import CONFIG, WEIGHTS, config
from tests.faults.lab import Lab, Outcome, SilentHost, judge

# the smallest model of each family, and how `VARIANTS` calls a narrow one
MODELS = {
    "biformer": ("biformer_tiny.in1k", "biformer"),
    "davit": ("davit_tiny.msft_in1k", "davit"),
    "l2vit": ("l2vit_tiny.in1k", "l2vit"),
    "maxvit": ("maxvit_rmlp_pico_rw_256.sw_in1k", "maxvit_rmlp"),
    "overlock": ("overlock_xt.in1k", "overlock_trained"),
    "ravlt": ("ravlt_t.in1k", "ravlt"),
    "shvit": ("shvit_s1.in1k", "shvit"),
    "tic": ("tic_tiny", "tic"),
}
OFFLINE_NAMES = (*MODELS, "l2vit from its URL")
STALL_NAMES = (
    "model, pinned revision",
    "weights, pinned revision",
    "model, official name",
    "weights, official name",
)


def run_offline(lab: Lab) -> dict[str, Outcome]:
    """Load a model of every family with a warm cache and HF_HUB_OFFLINE=1."""
    prepared = {name: (call, expected) for name, call, expected in _publish_families(lab)}
    calls = {name: call for name, (call, _) in prepared.items()}
    warm = lab.online.run(calls, parallel=2)
    before = lab.hub.total()
    outcomes = lab.offline.run(calls, parallel=2)
    failures = {}
    for name, (_, expected) in prepared.items():
        failures[name] = judge(warm[name], (), expected) or judge(outcomes[name], (), expected)
        if requests := lab.hub.total() - before:
            failures[name] += f" {requests} requests"
    return {name: Outcome(failures[name], outcomes[name].get("seconds", 0.0)) for name in failures}


def _publish_families(lab: Lab) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name of the case, how its model is loaded, and the hash of its weights."""
    for family, (name, variant) in MODELS.items():
        args = {} if lab.real_models else VARIANTS[variant].args
        weights = _half(name, args)
        expected = digest(weights)
        if family == "tic":
            lab.hub.add("acme/tic_tiny", {WEIGHTS: save(weights), CONFIG: _config(name, "head.fc")})
            yield family, _call("model", "hf-hub:acme/tic_tiny", args), expected
            continue
        lab.hub.add(f"acme/{name}", {WEIGHTS: save(weights)})
        yield family, _call("timm", name, args, "acme"), expected
        if family == "l2vit":
            url = lab.hub.add_plain("l2vit.safetensors", save(weights))
            overlay = {"pretrained_cfg_overlay": {"url": url}}
            yield "l2vit from its URL", _call("timm", name, args | overlay), expected


def _half(name: str, args: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights of a model in half precision."""
    torch.manual_seed(1)
    state_dict = timm.create_model(name, **args).state_dict()
    return {k: v.half() if v.is_floating_point() else v for k, v in state_dict.items()}


def _config(architecture: str, classifier: str) -> bytes:
    fields = {"classifier": classifier, "num_classes": 1000}
    return config({"architecture": architecture, "num_classes": 1000, "pretrained_cfg": fields})


def _call(do: str, name: str, args: dict[str, Any], organisation: str = "") -> dict[str, Any]:
    key = "location" if do == "weights" else "name"
    call = {"do": do, "arguments": {key: name, **args}}
    return call | {"environment": {"BACKBONES_HUB_ORG": organisation}}


def run_stalled(lab: Lab) -> dict[str, Outcome]:
    """Load with a warm cache while the hub accepts connections and never answers."""
    name, variant = MODELS["shvit"]
    args = VARIANTS[variant].args
    weights = _half(name, args)
    files = {WEIGHTS: save(weights), CONFIG: _config("shvit_s1", "head.l")}
    commit = lab.hub.add("f13/pinned", files)
    lab.hub.add(f"f13/{name}", {WEIGHTS: save(weights)})
    pinned = f"hf-hub:f13/pinned@{commit}"
    calls = {
        "model, pinned revision": _call("model", pinned, args),
        "weights, pinned revision": _call("weights", pinned, {}),
        "model, official name": _call("timm", name, args, "f13"),
        "weights, official name": _call("weights", name, {}, "f13"),
    }
    lab.online.run(calls)
    outcomes = {}
    with SilentHost() as host:
        client, connections = lab.client_of(host), 0
        for case, call in calls.items():
            outcome = client.run({case: call})[case]
            failure = judge(outcome, (), digest(weights))
            failure += " asks the hub" * (host.connections > connections)
            connections = host.connections
            outcomes[case] = Outcome(failure, outcome.get("seconds", 0.0))
    return outcomes
