"""F7: misuse of train.py and validate.py, each told in one line with cause and remedy."""

from __future__ import annotations

import functools
import re
import shutil
import zlib
from functools import partial
from pathlib import Path

import torch

from backbones.training import checkpoint
from backbones.training.commands import train, validate
from tests.faults.lab import Case, Lab
from tests.faults.trained import one_line
from tests.support.images import make_folder
from tests.support.runs import run

# quick, in case a mistake is not found
_TRAIN = (
    *("--model", "test_byobnet", "--processes", "1"),
    *("--epochs", "1", "--warmup-epochs", "0", "--batch-size", "718"),
)
_VALIDATE = ("--model", "test_byobnet", "--processes", "1")


@functools.cache
def _fixtures(lab: Lab) -> Path:
    """Data, recipes, weights and a run, whole and broken."""
    root = lab.folder / "usage"
    for name in ("data", "other", "no_val", "empty_class", "bad", "bad_val"):
        make_folder(root / name, train=8, val=2)
    (root / "other/val/dog").rename(root / "other/val/cow")
    shutil.rmtree(root / "no_val/val")
    (root / "empty_class/train/zebra").mkdir()
    for image in [*(root / "bad/train").rglob("*.png"), *(root / "bad_val/val").rglob("*.png")]:
        image.write_bytes(b"no image")
    for folder in ("nothing", "bare/train", "bare/val"):
        (root / folder).mkdir(parents=True)
    for name, text in _FILES.items():
        (root / name).write_bytes(text)
    done = run(train, *_TRAIN, "--out", "run", folder=root)
    assert done.code == 0, done.err
    _break_runs(root)
    return root


_FILES = {
    "broken.yaml": b"optim: {lr: [1\n",
    "list.yaml": b"- 1\n",
    "flat.yaml": b"lr: 1\n",
    "typo.yaml": b"optim: {lrr: 1}\n",
    "word.yaml": b"optim: {lr: fast}\n",
    "binary.yaml": bytes(range(256)),
    "file": b"not a folder",
    "weights.pth": b"not weights",
    "empty.pth": b"",
}


def _break_runs(root: Path) -> None:
    """Copies of a run in which something is damaged."""

    def copy(name: str) -> Path:
        shutil.copytree(root / "run", root / name)
        return root / name

    newest = checkpoint.latest(root / "run" / "ckpt")
    assert newest is not None
    for name, file, keep in (("cut", checkpoint.MODEL, 999), ("meta", checkpoint.META, 1)):
        path = copy(name) / "ckpt" / newest.name / file
        path.write_bytes(path.read_bytes()[:keep])
    (copy("no_config") / "config.yaml").unlink()
    (copy("foreign") / "config.yaml").write_text("model: 3\n")
    (copy("metrics") / "metrics.csv").write_text("a,b\n1,2\n")


# command line, @ for the fixtures: what the line says, cause and remedy
_TRAINING = {
    "--num-classes 3": "but the data has 10 classes: leave it out",
    "--data @no_val": "no_val has no val/ .*: put one folder per class there",
    "--data @nothing": "nothing has no train/ .*: put one folder per class there",
    "--data @bare": "Found 0 images .*: put one folder of images per class there",
    "--data @file": "no data at .*file: --data takes a folder",
    "--data @nowhere": "no data at .*nowhere: --data takes a folder",
    "--data @empty_class --batch-size 4": "no images in .*zebra .*: add images or delete",
    "--data @other --batch-size 4": "differ: only in training dog, only in validation cow",
    "--data @bad --batch-size 4": "training images cannot be read.*repair them, or raise --max-bad",
    "--data @bad_val --batch-size 4": "4 held-out images cannot be read.*repair them, or raise",
    "--data torch/nonsense": "Unknown torchvision dataset nonsense",
    "--data wds/x": "needs --data-root FOLDER",
    "--data wds/x --data-root @nothing": "no shards of train .*: name them",
    "--data hfids/x": "use hfds/ instead",
    "--model nope": "'nope' is unknown: see list_models",
    "--model shvit_s9": "did you mean shvit_s1",
    "--lrr 1": "unknown argument --lrr; did you mean --lr",
    "optim.lrr=1": "unknown setting optim.lrr; did you mean optim.lr",
    "stray": "no recipe stray",
    "--out": "argument --out: expected one argument .see --help",
    "--lr -1": "--lr must be positive and finite, not -1",
    "--lr nan": "--lr must be positive and finite, not nan",
    "--lr x": "takes float, not 'x'",
    "--lr-per 0": "--lr-per must be a batch size of 1 or more, not 0",
    "--min-lr -1": "min_lr must not be negative: -1",
    "--weight-decay -1": "--weight-decay is negative: -1",
    "--betas 2,3": "adamw does not take these settings: Invalid beta",
    "--optim adamx": "unknown optimizer adamx",
    "--momentum -1": "--momentum must lie between 0 and 1, not -1",
    "--layer-decay 2": "--layer-decay must lie between 0 and 1, not 2",
    "--clip 0": "--clip must be positive, not 0",
    "--accumulate 4": "use a multiple of 4",
    "--epochs 0": "--epochs must be at least 1, not 0",
    "--warmup-epochs 1": "1.0 must be less than --epochs 1",
    "--cooldown-epochs -1": "--cooldown-epochs is negative: -1",
    "--schedule cosin": "must be one of cosine, step, constant, not 'cosin'",
    "--recipe @missing.yaml": "no recipe .*missing.yaml",
    "@broken.yaml": "broken.yaml is not valid YAML",
    "@binary.yaml": "binary.yaml is not valid YAML",
    "@list.yaml": "must hold groups such as",
    "@flat.yaml": "`lr` must hold settings such as",
    "@typo.yaml": "optim.lrr in .*typo.yaml; did you mean",
    "@word.yaml": "takes float, not 'fast'",
    "--device cuda": "no cuda device: use --device cpu",
    "--device gpu": "must be one of auto, cpu",
    "--workers -1": "--workers is negative: -1",
    "--processes 3": "over 3 processes .* use a multiple of 3",
    "--processes 0": "--processes must be at least 1, not 0",
    "--batch-size 0": "--batch-size must be at least 1, not 0",
    "--batch-size 2000": "use --batch-size 1437 or less",
    "--batch-size 7 --mixup 1": "even number of images .*: change --batch-size",
    "--img-size 0": "--img-size must be at least 1, not 0",
    "--model test_vit --img-size 33": "--img-size 33: .*divisible by patch size .16",
    "--model shvit_s1 --img-size 7": "too small: use 32 or more",
    "--crop-pct 2": "--crop-pct must lie between 0 and 1, not 2",
    "--crop-mode middle": "must be one of center, squash, border, not 'middle'",
    "--interpolation x": "must be one of nearest, bilinear.*, not 'x'",
    "--mean 0.5": "--mean takes three numbers",
    "--std 0,0,0": "--std takes three numbers",
    "--max-bad nan": "--max-bad must lie between 0 and 1, not nan",
    "--ema-decay 1": "--ema-decay must lie between 0 and 1, not 1",
    "--amp fp8": "must be one of auto, none, bf16, fp16, not 'fp8'",
    "--drop-path 1": "--drop-path must be at least 0 and below 1, not 1",
    "--aux-weight 0.4": "test_byobnet has no auxiliary classifier",
    "--mixup -1": "augment.mixup must not be negative: -1",
    "--mixup-prob 2": "mixup_prob must lie between 0 and 1, not 2",
    "--scale 2,3": "--scale takes two positive numbers, the smaller one first",
    "--ratio 1": "--ratio takes two positive numbers",
    "--repeats 0": "--repeats must be at least 1, not 0",
    "--geometry crop --auto-augment x": "--auto-augment x is no policy .*: use one like rand-m9",
    "--teacher nope": "--teacher: model 'nope' is unknown",
    "--teacher-checkpoint @run": "needs --teacher",
    "--teacher test_vit --teacher-checkpoint @run": "--teacher: .*does not fit the model",
    "--distill-tau 0 --teacher test_byobnet": "--distill-tau must be positive",
    "--finetune @missing.pth": "missing.pth: no such file; give an existing file",
    "--finetune @weights.pth": "weights.pth: .*neither safetensors nor of torch.save",
    "--finetune @empty.pth": "empty.pth: it is empty",
    "--finetune @cut": "cut/.*truncated .*: delete it",
    "--finetune @run --pretrained": "both choose the weights: use one",
    "--finetune @run --model test_vit": "does not fit the model.*check --model",
    "--freeze nothing": "no part 'nothing'; its parts are stem",
    "--head-only --freeze stem": "leave out --freeze",
    "--parallel ddq": "must be one of ddp, fsdp2, not 'ddq'",
    "--timeout 0": "--timeout must be positive, not 0",
    "--keep 0": "--keep must be at least 1, not 0",
    "--checkpoint-every -1": "--checkpoint-every",
    "--out @file/out": "cannot write to .*: choose another --out",
    "--out /proc/out": "cannot write to /proc/out .*: choose another --out",
    "--out @run --lr 0.5": "--lr was 0.002, now 0.5; use the same settings",
    "--out @run --model test_vit": "--model was test_byobnet, now test_vit; use the same",
    "--out @run --data @data --batch-size 4": "--data was digits, now .*data",
    "--out @cut": "is damaged .*: delete this folder",
    "--out @meta": "is damaged .meta.json.*: delete this folder",
    "--out @no_config": "config.yaml cannot be read .*: choose another --out",
    "--out @foreign": "is not that of a run .*: choose another --out",
    "--out @metrics": "metrics.csv is damaged: delete it",
}
_VALIDATION = {
    "": "nothing to evaluate: use --checkpoint RUN_OR_FILE, or --pretrained",
    "--checkpoint @missing": "missing: no such file; give an existing file",
    "--checkpoint @nothing": "has no weight file; name one",
    "--checkpoint @weights.pth": "neither safetensors nor of torch.save",
    "--checkpoint @cut": "cut/.*truncated .*: delete it",
    "--checkpoint @meta": "is damaged .meta.json.*: delete this folder",
    "--checkpoint @none*": "nothing matches .*: see",
    "--checkpoint @run --ema": "has no moving average: leave out --ema",
    "--checkpoint @run --data @data": "for the classes of the data: evaluate it on the data",
    "--checkpoint @run --data @nowhere": "no data at .*nowhere: --data takes",
    "--checkpoint @run --model test_vit": "does not fit the model.*check --model",
    "--checkpoint @run --batch-size 0": "--batch-size must be at least 1, not 0",
    "--checkpoint @run --crop-pct 0": "--crop-pct must lie between 0 and 1, not 0",
    "--checkpoint @run --device cuda": "no cuda device: use --device cpu",
    "--checkpoint @run --real-labels @file": "--real-labels .*: use `imagenet`, or a JSON list",
    "--checkpoint @run --json @nothing": "must end in .json",
    "--checkpoint @run --lr 1": "unknown argument --lr; did you mean",
    "--pretraned": "unknown argument --pretraned; did you mean --pretrained",
}


def _refused(program: str, words: str, says: str, lab: Lab) -> str:
    """Run a program by mistake."""
    if "--device cuda" in words and torch.cuda.is_available():
        return ""
    root = _fixtures(lab)
    argv = [word.replace("@", f"{root}/") for word in words.split()]
    folder = root / f"{program}-{zlib.crc32(words.encode())}"
    call, first = (train, _TRAIN) if program == "train.py" else (validate, _VALIDATE)
    done = run(call, *first, *argv, folder=folder)
    if done.code != 2:
        return f"exit code {done.code}: {done.err[-2000:]}"
    if wrong := one_line(done):
        return wrong
    return "" if re.search(says, done.err) else f"does not say {says!r}: {done.err}"


def _cases(program: str, table: dict[str, str]) -> dict[str, Case]:
    return {
        f"{program} {words}".strip(): partial(_refused, program, words, says)
        for words, says in table.items()
    }


CASES = _cases("train.py", _TRAINING) | _cases("validate.py", _VALIDATION)
