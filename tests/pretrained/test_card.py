"""Model cards: what they state, and what they do not."""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from backbones.pretrained import FAMILIES, find_weights, tic, weights_tables
from backbones.pretrained.card import Facts, license_of, model_card
from backbones.pretrained.table import Weights

SETTINGS = ("num_classes", "input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
ROWS = [(family, row) for family, table in weights_tables().items() for row in table]


def facts(family: str, row: Weights | None, **changes) -> Facts:
    like = row or find_weights("shvit_s1")
    return Facts(
        model=row.model if row else f"{family}_tiny",
        family=family,
        paper=row.paper if row else tic.PAPER,
        weights=row,
        license=row.license if row else "unknown",
        parameters=6_330_808,
        macs=None,
        source="file.pth",
        source_sha256="0123456789abcdef" * 4,
        copy="the plain weights; the file has no other",
        **{**{name: getattr(like, name) for name in SETTINGS}, **changes},
    )


@pytest.mark.parametrize(("family", "row"), ROWS, ids=[row.name for _, row in ROWS])
def test_the_header_is_what_the_table_says(family, row):
    text = model_card(facts(family, row))
    data = ModelCard(text).data
    task = "image-classification" if row.num_classes else "image-feature-extraction"
    assert (data.license, data.library_name, data.pipeline_tag) == (row.license, "timm", task)
    assert data.tags == [task, "timm", "backbones", family]
    assert ("imagenet-1k" in (data.datasets or [])) == ("in1k" in row.name)
    values = list(row.top1.values())
    if values:
        (result,) = data.eval_results
        assert (data.model_name, result.metric_value) == (row.name, values[0])
        assert result.dataset_type == "imagenet-1k"
        assert result.source_url.startswith("https://")
    else:
        assert data.eval_results is None and "No accuracy was reported" in text
    for words in (row.note, row.paper.bibtex, row.paper.code, "0123456789abcdef", row.license):
        assert words in text
    assert all(f"{value:g} %" in text for value in values)


def test_datasets_of_fine_tuned_weights():
    card = ModelCard(model_card(facts("maxvit", find_weights("maxvit_base_tf_384.in21k_ft_in1k"))))
    assert card.data.datasets == ["imagenet-1k", "imagenet-21k"]


def test_the_reconstruction_claims_nothing():
    text = model_card(facts("tic", None))
    assert "TiC is a reconstruction" in text
    assert "no model, no weights and no training code" in text
    assert "no number of the paper is claimed" in text
    assert "%" not in text and "model-index" not in text and "datasets" not in text
    assert license_of(text) == "unknown"


def test_code_without_a_licence_is_said_to_be_so():
    text = model_card(facts("ravlt", find_weights("ravlt_t")))
    assert "https://github.com/qhfan/RALA, states no licence" in text
    assert "The weights are under MIT." in text


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_ones_own_have_no_metrics(family):
    known = FAMILIES[family].WEIGHTS
    paper = known[0].paper if known else tic.PAPER
    text = model_card(replace(facts(family, None), paper=paper, license="cc0-1.0"))
    assert "%" not in text and "model-index" not in text
    assert ModelCard(text).data.license == license_of(text) == "cc0-1.0"
    assert paper.bibtex in text


def test_what_became_of_the_tensors_is_stated():
    row = find_weights("ravlt_t")
    text = model_card(facts("ravlt", row, changes=("Left out: RoPE",), num_classes=0))
    assert "- Left out: RoPE" in text and "- Classes: none" in text
    text = model_card(replace(facts("ravlt", row), macs=2_613_312_000))
    assert "2.613 G multiply-adds" in text


def test_the_same_facts_give_the_same_card():
    row = find_weights("l2vit_tiny")
    assert model_card(facts("l2vit", row)) == model_card(facts("l2vit", row))


def test_a_card_without_header_has_no_licence():
    assert license_of("# weights") == ""
    with pytest.raises(ValueError, match="dict"):
        license_of("---\n- a\n---\n")
