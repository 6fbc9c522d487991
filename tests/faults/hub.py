"""F8: faults of the hub and of what lies on it.

Twenty-eight cases, counted as the research of the hub's client counted them: conditions that a
slash or a semicolon separates are cases of their own, but for "wrong shape / missing tensor" and
"classes or channels differ". A case is survived if all of its injections are: faults of the network
are injected into the configuration and into the weights; those of the weights are met by
`backbones.create_model` and by `timm.create_model`, which reads configurations by itself. To
survive is to load the right weights, or to raise one `WeightsError` of one line that names the
repository and the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor

import backbones  # noqa: F401
from tests.faults.client import digest
from tests.faults.lab import NARROW, Lab, Outcome, SilentHost, judge, partial_files

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_HEAD = ("head.", "patch_embed.0.")
_BY_TIMM = ("model", "timm")


@dataclass(frozen=True)
class Injection:
    """One fault, and what shall come of it.

    Attributes:
        fault: Of the stand-in hub: kind, method and how often.
        file: In which file it is injected.
        warm: Whether they are in the cache before it happens.
        host: "hub", "offline", "silent" or "gone".
        config: Fields of the configuration that differ, or all of it.
        weights: Which weights, see `_weights`; None if there are none.
        arguments: What the caller asks for.
        calls: What loads it; see `Client`.
        revision: After the name of the repository.
        absent: Whether there is no such repository.
        says: What the error says; empty if there shall be none.
        logs: What a line of the log says.
        again: Whether it loads when it is tried again.
    """

    fault: tuple[str, str, int] | None = None
    file: str = WEIGHTS
    warm: bool = False
    host: str = "hub"
    config: dict[str, Any] | bytes = field(default_factory=dict)
    weights: str | None = "plain"
    arguments: dict[str, Any] = field(default_factory=dict)
    calls: tuple[str, ...] = ("model",)
    revision: str = ""
    absent: bool = False
    says: tuple[str, ...] = ()
    logs: str = ""
    again: bool = False


def _network(
    kind: str, method: str, times: int, calls: tuple[str, ...] = ("model",), **kwargs: Any
) -> tuple[Injection, ...]:
    """A fault met in the configuration and in the weights."""
    fault = (kind, method, times)
    return Injection(fault, CONFIG, **kwargs), Injection(fault, calls=calls, **kwargs)


def _configured(says: tuple[str, ...] = (), **config: Any) -> Injection:
    return Injection(config=config, says=says)


_MIRROR = "set HF_ENDPOINT to a mirror"
_MEND = "ask its author"
_FIT = "the weights do not fit the model"

CASES: dict[str, tuple[Injection, ...]] = {
    "body truncated once": _network("truncate", "GET", 1),
    "body truncated always": _network(
        "truncate", "GET", -1, _BY_TIMM, says=("closed", _MIRROR)
    ),
    "short body of the length it states": (
        *_network("short", "GET", -1, says=("should be of size", _MIRROR)),
        Injection(("html", "GET", -1), says=("should be of size", _MIRROR)),
    ),
    "one bit flipped": _network(
        "corrupt", "GET", 1, _BY_TIMM, again=True, says=("is damaged", "load it again")
    ),
    "HEAD 500 once": _network("500", "HEAD", 1),
    "HEAD 500 always, warm cache": _network("500", "HEAD", -1, warm=True),
    "GET 503 once": _network("503", "GET", 1, _BY_TIMM),
    "GET 429 once": _network("429", "GET", 1),
    "GET reset once": (*_network("reset", "GET", 1), Injection(("reset", "HEAD", 1))),
    "HEAD reset, warm cache": (
        *_network("reset", "HEAD", -1, _BY_TIMM, warm=True),
        Injection(("close", "HEAD", -1), warm=True),
    ),
    "server refuses, warm cache": (Injection(host="gone", warm=True, calls=_BY_TIMM),),
    "server refuses, cold": (Injection(host="gone", says=("cannot load", _MIRROR)),),
    "server never answers, warm cache": (Injection(host="silent", warm=True),),
    "offline, warm cache": (Injection(host="offline", warm=True, calls=_BY_TIMM),),
    "offline, cold": (Injection(host="offline", says=("HF_HUB_OFFLINE is set", "fill the cache")),),
    "no such repository": (
        Injection(absent=True, says=("RepositoryNotFoundError", "check the name", "HF_TOKEN")),
    ),
    "no such revision": (
        Injection(revision="@v9", says=("@v9", "Invalid rev id: v9", "check the revision")),
    ),
    "gated": _network("gated", "HEAD", -1, says=("GatedRepoError", "accept the terms", "HF_TOKEN")),
    "no weights": (
        Injection(weights=None, calls=_BY_TIMM, says=("pytorch_model.bin", "choose a file")),
    ),
    "config.json broken": tuple(
        Injection(config=content, says=("not JSON|no configuration", _MEND))
        for content in (b'{"architecture": ', b"\xff", b"[" * 100_000, b"[]", b"")
    ),
    "config.json without architecture": (_configured(("no 'architecture'",), architecture=None),),
    "config.json of an unknown architecture": (
        _configured(("'shvit_s9' is no model", "author mean shvit"), architecture="shvit_s9"),
        _configured(("'nope_t' is no model",), architecture="nope_t"),
    ),
    "config.json with img_size 1e9": (
        Injection(
            config={"model_args": {"img_size": 1e9}},
            calls=_BY_TIMM,
            says=("img_size is 1000000000.0, outside 32 to 4096",),
        ),
    ),
    "config.json with file=/etc/passwd": (
        Injection(
            config={"pretrained_cfg": {"file": "/etc/passwd", "source": "local-dir"}},
            calls=_BY_TIMM,
        ),
    ),
    "config.json with hf_hub_filename=../": (
        _configured(pretrained_cfg={"hf_hub_filename": "../../../../etc/passwd"}),
        Injection(
            config={"pretrained_cfg": {"hf_hub_filename": "../../../../etc/passwd"}},
            calls=("timm",),
            says=("'..' path segment", "no .. in filename="),
        ),
    ),
    "wrong shape, missing tensor": (
        Injection(weights="wrong shape", calls=_BY_TIMM, says=(_FIT, "patch_embed.2.bn.bias is")),
        Injection(weights="missing", calls=_BY_TIMM, says=(_FIT, "missing patch_embed.2.bn.bias")),
    ),
    "NaN in a tensor": (
        Injection(weights="nan", calls=_BY_TIMM, says=("patch_embed.2.bn.bias holds NaN",)),
    ),
    "classes or channels differ": (
        Injection(
            weights="seven classes",
            calls=_BY_TIMM,
            says=("says 3 classes, but the weights have 7", _MEND),
        ),
        Injection(arguments={"num_classes": 5}, calls=_BY_TIMM, logs="classifier starts fresh"),
        Injection(arguments={"in_chans": 1}, calls=_BY_TIMM),
    ),
}  # fmt: skip
NAMES = tuple(CASES)


def narrow_weights() -> dict[str, Tensor]:
    """Weights of the narrow model, of three classes."""
    torch.manual_seed(0)
    model = timm.create_model("shvit_s1", num_classes=3, **NARROW)
    return {
        name: torch.rand_like(value) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }


def _weights(kind: str, plain: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "patch_embed.2.bn.bias"
    if kind == "wrong shape":
        return plain | {name: torch.rand(17)}
    if kind == "missing":
        return {key: value for key, value in plain.items() if key != name}
    if kind == "nan":
        return plain | {name: torch.full_like(plain[name], float("nan"))}
    if kind == "seven classes":
        return plain | {"head.l.weight": torch.rand(7, 72), "head.l.bias": torch.rand(7)}
    return plain


def config(fields: dict[str, Any]) -> bytes:
    """The configuration of the narrow model with other fields."""
    cfg = {"num_classes": 3, "classifier": "head.l", "first_conv": "patch_embed.0.c"}
    cfg |= fields.get("pretrained_cfg", {})
    base = {"architecture": "shvit_s1", "num_classes": 3}
    merged = base | fields | {"pretrained_cfg": cfg}
    return json.dumps({key: value for key, value in merged.items() if value is not None}).encode()


@dataclass
class _Trial:
    """One injection, met by one caller, in a repository of its own."""

    case: str
    injection: Injection
    do: str
    repo_id: str

    def call(self) -> dict[str, Any]:
        name = {"name": f"hf-hub:{self.repo_id}{self.injection.revision}"}
        return {"do": self.do, "arguments": name | NARROW | self.injection.arguments}

    def publish(self, lab: Lab, plain: dict[str, Tensor]) -> None:
        injection = self.injection
        if injection.absent:
            return
        given = injection.config
        files = {CONFIG: given if isinstance(given, bytes) else config(given)}
        if injection.weights is not None:
            files[WEIGHTS] = save(_weights(injection.weights, plain))
        lab.hub.add(self.repo_id, files)

    def inject(self, lab: Lab) -> None:
        if self.injection.fault is not None:
            lab.hub.fail(f"{self.repo_id}/{self.injection.file}", *self.injection.fault)

    def judge(self, lab: Lab, outcome: dict[str, Any], plain: dict[str, Tensor]) -> str:
        """Why the outcome is not what it should be; empty if it is."""
        injection = self.injection
        same = {} if injection.arguments else {"digest": digest(plain)}
        # by its name, or by that of its folder in the cache
        name = self.repo_id.replace("/", "(/|--)")
        says = (*injection.says, name) if injection.says else ()
        failure = judge(outcome, says, body=digest(plain, _HEAD), **same)
        if not failure and injection.logs not in " ".join(outcome["lines"]):
            failure = f"logs nothing of it: {outcome['lines']}"
        if partial := partial_files(lab.cache(self.repo_id)):
            failure += f" leaves {partial}"
        return failure


def _trials() -> Iterator[_Trial]:
    for case, injections in CASES.items():
        for i, injection in enumerate(injections):
            for do in injection.calls:
                words = (*case.split(), str(i), do)
                slug = "-".join("".join(filter(str.isalnum, word)) for word in words)
                yield _Trial(case, injection, do, f"f8/{slug}")


def run(lab: Lab) -> dict[str, Outcome]:
    """Inject every case and say what came of it."""
    plain, trials = narrow_weights(), list(_trials())
    for trial in trials:
        trial.publish(lab, plain)
        if not trial.injection.warm:
            trial.inject(lab)
    by_host: dict[str, dict[str, dict[str, Any]]] = {}
    for trial in trials:
        by_host.setdefault(trial.injection.host, {})[trial.repo_id] = trial.call()
    warm = {t.repo_id: t.call() for t in trials if t.injection.warm}
    lab.online.run(warm)
    for trial in trials:
        if trial.injection.warm:
            trial.inject(lab)
    outcomes = lab.online.run(by_host["hub"]) | lab.offline.run(by_host["offline"])
    with SilentHost() as host:
        client = lab.client_of(host)
        outcomes |= client.run(by_host["silent"])
        host.close()
        outcomes |= client.run(by_host["gone"])
    again = {t.repo_id: t.call() for t in trials if t.injection.again}
    for repo_id, outcome in lab.online.run(again).items():
        if failure := judge(outcome, (), digest(plain)):
            outcomes[repo_id] = {"error": "again", "message": failure}
    return _collect(lab, trials, outcomes, plain)


def _collect(
    lab: Lab, trials: list[_Trial], outcomes: dict[str, dict[str, Any]], plain: dict[str, Tensor]
) -> dict[str, Outcome]:
    failures: dict[str, list[str]] = {name: [] for name in NAMES}
    for trial in trials:
        if failure := trial.judge(lab, outcomes[trial.repo_id], plain):
            failures[trial.case].append(f"{trial.do}, {trial.injection.file}: {failure}")
    return {name: Outcome(" | ".join(found)) for name, found in failures.items()}
