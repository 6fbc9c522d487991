"""The table of official weights: facts that hold for every row."""

import re

import pytest
import timm

from backbones.pretrained import find_weights, maxvit, tic, weights_tables

ROWS = [row for table in weights_tables().values() for row in table]
PLACES = {"paper", "timm", "repository", "log"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_is_complete(row):
    assert timm.is_model(row.model)
    assert bool(row.hub_id) + row.direct + bool(row.dead_links) == 1
    assert row.hub_id or row.urls
    assert row.wrapping
    assert re.fullmatch(r"mit|apache-2\.0", row.license)
    assert set(row.top1) <= PLACES
    assert all(70 < percent < 90 for percent in row.top1.values())
    assert not row.top1 or row.num_classes == 1000
    assert row.note.endswith((".", ")")) and not row.note.endswith("..")
    for url in (*row.urls, row.paper.code):
        assert url.startswith("https://")
    if row.direct:
        assert row.urls[0].endswith(f"/{row.filename}")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_images_are_taken_as_timm_says(row):
    cfg = timm.get_pretrained_cfg(row.name)
    assert (cfg.hf_hub_id or None, cfg.num_classes) == (row.hub_id, row.num_classes)
    for key in ("input_size", "crop_pct", "crop_mode", "interpolation"):
        assert getattr(cfg, key) == getattr(row, key), key
    assert (tuple(cfg.mean), tuple(cfg.std)) == (row.mean, row.std)


PAPERS = sorted({row.paper for row in ROWS} | {tic.PAPER}, key=lambda p: (p.arxiv, p.code))


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.code)
def test_paper_is_complete(paper):
    assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
    assert all(re.fullmatch(r"[A-Z][\w-]+( [A-Z][\w-]+)+", author) for author in paper.authors)
    assert paper.code_license in ("mit", "apache-2.0", "none")
    assert paper.venue in ("CVPR", "ECCV", "")
    # a preprint is as old as its number says; conferences come later
    assert paper.year - 2000 - int(paper.arxiv[:2]) in ((0, 1) if paper.venue else (0,))


def test_bibtex():
    assert find_weights("shvit_s1").paper.bibtex == (
        "@inproceedings{yun2024shvit,\n"
        "  title = {{SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design}},\n"
        "  author = {Seokju Yun and Youngmin Ro},\n"
        "  booktitle = {CVPR},\n"
        "  year = {2024},\n"
        "  eprint = {2401.16456},\n"
        "  archivePrefix = {arXiv},\n"
        "}"
    )
    preprint = find_weights("l2vit_tiny").paper.bibtex
    assert preprint.startswith("@misc{zheng2025linear,") and "booktitle" not in preprint


def test_whose_paper():
    code = {name: find_weights(name).paper.code for name in ("davit_tiny", "davit_huge_fl")}
    assert code["davit_huge_fl"] == "https://huggingface.co/microsoft/Florence-2-large"
    assert code["davit_tiny"] == "https://github.com/dingmyu/davit"
    ours, official = find_weights("maxvit_tiny_rw_224"), find_weights("maxvit_tiny_tf_224")
    assert ours.paper.arxiv == official.paper.arxiv
    assert ours.paper.code.endswith("/pytorch-image-models")
    assert find_weights("ravlt_t").paper.code_license == "none"


def test_what_a_file_was_converted_from():
    root = "https://console.cloud.google.com/storage/browser/gresearch/maxvit/ckpts"
    for name, folder in {
        "maxvit_tiny_tf_512.in1k": "maxvittiny/i1k/512",
        "maxvit_base_tf_224.in21k": "maxvitbase/i21k_pt/224",
        "maxvit_xlarge_tf_384.in21k_ft_in1k": "maxvitxlarge/i21k_i1k/384",
    }.items():
        assert find_weights(name).converted_from == f"{root}/{folder}"
    theirs = {row.name for row in maxvit.WEIGHTS if "_rw_" in row.name}
    assert {row.name for row in maxvit.WEIGHTS if not row.converted_from} == theirs
    shvit = find_weights("shvit_s3")
    assert (shvit.converted_from,) == shvit.urls
    assert not find_weights("ravlt_t").converted_from


def test_format_follows_from_the_name_of_the_file():
    formats = {row.name: row.format for row in ROWS}
    assert formats["shvit_s1.in1k"] == "safetensors"
    assert formats["davit_base_fl.msft_florence2"] == formats["ravlt_t.in1k"] == "torch"
    assert {formats[row.name] for row in ROWS if row.hub_id is None} == {"torch"}
