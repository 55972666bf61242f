"""Training pairs of the retriever, from packages in the official layout, made small here."""

import json

import numpy as np
import pytest

from grape_jax.runtime.errors import UserError
from recipes.retriever import icons
from recipes.retriever.icons import Concept

ROCKET = Concept("1F680", "🚀", "rocket", "rocket", ("launch", "space", "vehicle", "rockets"))
PARTY = Concept(
    "1F389",
    "🎉",
    "party popper",
    "party popper",
    ("celebrate", "confetti", "excited", "hooray", "party", "tada", "woohoo"),
)


@pytest.fixture
def npm(tmp_path):
    """Two styles' worth of the layout that npm installs."""
    write_style(
        tmp_path,
        "noto",
        {
            "width": 128,
            "height": 128,
            "icons": {"rocket": {"body": '<circle cx="64" cy="64" r="50" fill="red"/>'}},
            "aliases": {
                "party-popper": {"parent": "rocket"},
                "fire": {"parent": "rocket", "hFlip": True},
            },
        },
        {"1f680": "rocket"},
    )
    rocket = {"default": ["launch", "rocket", "space"], "tts": ["rocket"]}
    write_cldr(tmp_path, "cldr-annotations-full", "annotations", {"🚀": rocket})
    write_cldr(tmp_path, "cldr-annotations-derived-full", "annotationsDerived", {})
    return tmp_path


def write_style(npm, style, data, chars):
    folder = npm / "@iconify-json" / style
    folder.mkdir(parents=True)
    (folder / "icons.json").write_text(json.dumps(data))
    (folder / "chars.json").write_text(json.dumps(chars))


def write_cldr(npm, package, key, entries):
    folder = npm / package / key / "en"
    folder.mkdir(parents=True)
    (folder / "annotations.json").write_text(json.dumps({key: {"annotations": entries}}))


def test_concepts_follow_the_gallery(npm):
    from grape_jax.data import openmoji

    concepts = icons.concepts(npm)
    assert [c.code for c in concepts] == [p.code for p in openmoji.gallery()]
    rocket = next(c for c in concepts if c.emoji == "🚀")
    assert rocket.keywords == ("launch", "space")


@pytest.mark.slow
def test_icons_are_found_by_characters_by_name_and_by_alias(npm):
    svgs = icons.style_svgs(npm, "noto", [ROCKET, PARTY])
    assert set(svgs) == {ROCKET.code, PARTY.code}
    drawn = icons.render_all([svgs[ROCKET.code], "not a picture"], 32)
    assert drawn.shape == (2, 32, 32, 3)
    assert tuple(drawn[0, 16, 16]) == (255, 0, 0) and tuple(drawn[0, 0, 0]) == (255, 255, 255)
    assert icons.is_blank(drawn[1]) and not icons.is_blank(drawn[0])


def test_a_mirrored_alias_is_another_picture(npm):
    fire = Concept("1F525", "🔥", "fire", "fire", ())
    assert icons.style_svgs(npm, "noto", [fire]) == {}


def test_texts_are_english_words_of_the_concept_and_frames():
    """No word comes from anywhere but the English texts: no other language, no typing error."""
    rng = np.random.default_rng(0)
    for concept in (ROCKET, PARTY):
        concept_words = icons.words(" ".join((concept.name, concept.cldr_name, *concept.keywords)))
        allowed = {*concept_words, *icons.words(" ".join(icons.FRAMES))}
        texts = [icons.sample_text(concept, rng) for _ in range(500)]
        assert all(set(icons.words(text)) <= allowed for text, _ in texts)
        assert all(concept.name in text for text, whole in texts if whole)
        assert len({text for text, _ in texts}) > 50


def test_held_out_phrase_is_never_sampled():
    held = icons.held_out_phrase(PARTY)
    assert held == icons.held_out_phrase(PARTY) and len(held.split(", ")) == 3
    assert icons.held_out_phrase(ROCKET) == ""
    rng = np.random.default_rng(0)
    wanted = sorted(held.split(", "))
    for _ in range(3000):
        text, _ = icons.sample_text(PARTY, rng)
        assert sorted(icons.words(text)) != wanted


def test_same_seed_same_texts():
    def texts(seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        return [icons.sample_text(PARTY, rng)[0] for _ in range(20)]

    assert texts(3) == texts(3) != texts(4)


def test_missing_packages_name_the_command(tmp_path):
    with pytest.raises(UserError, match="npm install @iconify-json/noto"):
        icons.style_svgs(tmp_path, "noto", [ROCKET])


def test_damaged_package_is_named(npm):
    (npm / "@iconify-json" / "noto" / "icons.json").write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        icons.style_svgs(npm, "noto", [ROCKET])
