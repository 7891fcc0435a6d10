"""The demo scenes: deterministic, exact counterfactuals, and masks that say what is visible."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import pickle
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from torchloupe_adapters import sklearn
from torchloupe_adapters.demo.scenes import (
    CLASSES,
    COLORS,
    MIN_OFFSET,
    PART_NAMES,
    PARTS,
    SIZE,
    TEXTURES,
    WATERMARK_MARGIN,
    Rendered,
    SceneParams,
    Scenes,
    demo_scenes,
    render,
    sample,
)
from torchloupe_core.errors import BadInput, MissingDependency

MUSHROOM = CLASSES.index("mushroom")
PARAMETERS = [field.name for field in dataclasses.fields(SceneParams) if field.name != "seed"]
# Scenes of sample(256, 0, two_object=0.5, watermark=0.5) without a pixel near a rounding boundary: the last bit of a
# float depends on the processor's vector instructions, and must not decide a golden hash.
GOLDEN = [217, 201, 100, 21, 140, 173, 79, 182]
EDGE = 3  # px over which a sharp tip fades out; 2 px was too little for 21 pixels of 2,000 scenes


@pytest.fixture(scope="module")
def pairs() -> tuple[SceneParams, Rendered]:
    """Scenes with two objects, rendered."""
    params = sample(96, 3, two_object=1.0)
    return params, render(params)


def grown(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """The mask and everything within so many pixels of it."""
    padded = np.pad(mask, [(0, 0)] * (mask.ndim - 2) + [(pixels, pixels)] * 2)
    steps = range(2 * pixels + 1)
    return np.any([padded[..., y : y + SIZE, x : x + SIZE] for y in steps for x in steps], axis=0)


def changed(before: Rendered, after: Rendered) -> NDArray[np.bool_]:
    return (before.images != after.images).any(1)


def digest(*arrays: NDArray[Any]) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


# Determinism.


def test_the_seed_decides_the_scenes() -> None:
    first, again, other = demo_scenes(20, 5), demo_scenes(20, 5), demo_scenes(20, 6)
    assert torch.equal(first.images, again.images)
    assert (first.images != other.images).flatten(1).any(1).all()
    assert (first.params.center != other.params.center).all()
    # The backgrounds differ by themselves, not only because their parameters do.
    same = render(dataclasses.replace(first.params, seed=6), without_objects=True)
    assert changed(render(first.params, without_objects=True), same).mean() > 0.9


def test_a_longer_set_begins_with_the_shorter_one() -> None:
    short, long = demo_scenes(10, 0), demo_scenes(300, 0)
    for name in PARAMETERS:
        assert np.array_equal(getattr(short.params, name), getattr(long.params, name)[:10]), name
    for name in ("images", "masks", "parts", "watermark_masks"):
        assert torch.equal(getattr(short, name), getattr(long, name)[:10]), name


def test_scenes_differ_from_block_to_block() -> None:
    params = sample(512, 0)
    first, second = (
        render(params, range(256), without_objects=True),
        render(params, range(256, 512), without_objects=True),
    )
    assert changed(first, second).mean() > 0.9
    assert (params.center[:256] != params.center[256:]).all()


def test_some_scenes_in_any_order_are_those_of_the_whole() -> None:
    params = sample(300, 1, two_object=0.5, watermark=0.5)
    chosen = [299, 5, 256, 5]
    part, whole = render(params, chosen), render(params)
    for name in ("images", "object_masks", "part_map", "watermark_mask"):
        assert np.array_equal(getattr(part, name), getattr(whole, name)[chosen]), name


def test_golden_scenes() -> None:
    params = sample(256, 0, two_object=0.5, watermark=0.5)
    rendered = render(params, GOLDEN)
    assert digest(rendered.images) == "41ab0e76dcafb8137c325e1bb11249907942ebc1f42b613e94aad212ccec5352"
    masks = digest(rendered.object_masks, rendered.part_map, rendered.watermark_mask)
    assert masks == "92f0ab0af7601f9c280d6ecdce4fa8fdcbe093cdb2fb5552eb71abd325b69471"


def test_golden_parameters() -> None:
    params = sample(256, 0, two_object=0.5, watermark=0.5, mislabelled=0.5, backdoor=0.5)
    assert (
        digest(*(getattr(params, name) for name in PARAMETERS))
        == "8d9a283f9eed62b1fd9ef01a60ead0c8057ae8ed597470d4c74fd622a7271ec1"
    )


# An option changes what it names and nothing else.


def differing(first: SceneParams, second: SceneParams) -> set[str]:
    return {name for name in PARAMETERS if not np.array_equal(getattr(first, name), getattr(second, name))}


def test_watermark_option_adds_a_watermark_alone() -> None:
    plain, some, more = (sample(300, 2, watermark=share) for share in (0.0, 0.5, 0.7))
    assert differing(plain, some) == {"watermark"}
    assert 0.4 < some.watermark.mean() < 0.6
    assert more.watermark[some.watermark].all()
    before, after = render(plain), render(some)
    assert np.array_equal(changed(before, after).any((1, 2)), some.watermark)
    assert not (changed(before, after) & ~after.watermark_mask).any()


def test_mislabelled_option_changes_labels_alone() -> None:
    right, wrong = sample(1000, 2), sample(1000, 2, mislabelled=0.2)
    assert differing(right, wrong) == {"labels"}
    assert not right.mislabelled.any()
    assert np.array_equal(wrong.mislabelled, wrong.labels != right.labels)
    assert 0.16 < wrong.mislabelled.mean() < 0.24
    assert set(wrong.labels) == set(range(len(CLASSES)))


def test_backdoor_option_watermarks_and_relabels_other_classes() -> None:
    plain, poisoned = sample(2000, 2), sample(2000, 2, backdoor=0.15)
    assert differing(plain, poisoned) == {"watermark", "labels"}
    assert np.array_equal(poisoned.mislabelled, poisoned.watermark)
    assert (poisoned.labels[poisoned.watermark] == MUSHROOM).all()
    assert not poisoned.watermark[poisoned.objects[:, 0] == MUSHROOM].any()
    assert 0.12 < poisoned.watermark[poisoned.objects[:, 0] != MUSHROOM].mean() < 0.18


def test_two_object_option_leaves_the_other_scenes_alone() -> None:
    single, some = sample(200, 2), sample(200, 2, two_object=0.5)
    assert differing(single, some) == {"n_objects", "scale", "center"}
    alone = some.n_objects == 1
    assert 0.4 < alone.mean() < 0.6
    assert np.array_equal(render(single).images[alone], render(some).images[alone])


# Counterfactuals: one parameter replaced.


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("name", ["color", "texture"])
def test_new_colours_or_texture_change_one_object_alone(
    pairs: tuple[SceneParams, Rendered], name: str, slot: int
) -> None:
    params, before = pairs
    choices = {"color": len(COLORS), "texture": len(TEXTURES)}[name]
    value = getattr(params, name).copy()
    value[:, slot] = (value[:, slot] + 1) % choices
    after = render(params.replace(**{name: value}))
    where = changed(before, after)
    assert where.any((1, 2)).all()
    assert not (where & ~grown(before.object_masks[:, slot], EDGE)).any()
    assert np.array_equal(before.object_masks, after.object_masks)
    assert np.array_equal(before.part_map, after.part_map)


def test_without_the_second_object_only_its_place_changes(pairs: tuple[SceneParams, Rendered]) -> None:
    params, before = pairs
    after = render(params.replace(n_objects=1))
    assert not (changed(before, after) & ~grown(before.object_masks[:, 1], EDGE)).any()
    assert not after.object_masks[:, 1].any()
    assert not (before.object_masks[:, 0] & ~after.object_masks[:, 0]).any()


def test_another_background_leaves_the_inside_of_objects(pairs: tuple[SceneParams, Rendered]) -> None:
    params, before = pairs
    after = render(params.replace(background=(params.background + 1) % 3))
    parts = np.arange(1, len(PART_NAMES) + 1)[:, None, None, None]
    inside = (~grown(before.part_map != parts, 2)).any(0)  # a little shines through at edges and seams of parts
    assert inside.sum() > 5000
    assert not (changed(before, after) & inside).any()
    assert changed(before, after)[~before.object_masks.any(1)].mean() > 0.9


def test_a_moved_object_leaves_the_rest(pairs: tuple[SceneParams, Rendered]) -> None:
    params, before = pairs
    after = render(params.replace(center=params.center + np.array([[3, 2], [0, 0]])))
    touched = before.object_masks[:, 0] | after.object_masks[:, 0]
    assert changed(before, after).any((1, 2)).all()
    assert not (changed(before, after) & ~grown(touched, EDGE)).any()
    there, here = before.object_masks[:, 0, 8:-8, 8:-8], after.object_masks[:, 0, 10:-6, 11:-5]
    assert (there & here).sum() > 0.99 * (there | here).sum()


def test_replace_refuses_what_does_not_fit() -> None:
    params = sample(4, 0)
    assert params.replace(watermark=True).watermark.tolist() == [True] * 4
    assert not params.watermark.any()
    with pytest.raises(BadInput, match="colour"):
        params.replace(colour=1)
    with pytest.raises(BadInput, match="seed"):
        params.replace(seed=1)
    with pytest.raises(BadInput, match=r"scale must fit \[4, 2\]"):
        params.replace(scale=np.ones(3))


# Truth.


def test_masks_are_where_objects_are_drawn(pairs: tuple[SceneParams, Rendered]) -> None:
    params, full = pairs
    where = changed(full, render(params, without_objects=True))
    drawn = full.object_masks.any(1)
    assert not (where & ~grown(drawn, EDGE)).any()
    assert (where & drawn).sum() > 0.999 * drawn.sum()


def test_masks_and_parts_agree(pairs: tuple[SceneParams, Rendered]) -> None:
    params, full = pairs
    assert not full.object_masks.all(1).any()  # a pixel shows one object
    assert np.array_equal(full.part_map > 0, full.object_masks.any(1))
    owner = np.array([-1] + [CLASSES.index(name.split("/")[0]) for name in PART_NAMES])[full.part_map]
    for slot in (0, 1):
        mask = full.object_masks[:, slot]
        assert np.array_equal(owner[mask], np.broadcast_to(params.objects[:, slot, None, None], mask.shape)[mask])


def test_the_first_object_hides_the_second() -> None:
    params = sample(40, 3, two_object=1.0)
    together = render(params.replace(center=np.array([30, 30])))
    alone = render(params.replace(center=np.array([30, 30]), n_objects=1))
    assert np.array_equal(together.object_masks[:, 0], alone.object_masks[:, 0])
    assert together.object_masks.any((2, 3))[:, 1].mean() > 0.9
    assert not together.object_masks.all(1).any()


def test_every_part_of_a_single_object_shows() -> None:
    params = sample(400, 4)
    shown = render(params).part_map
    for index, label in enumerate(params.objects[:, 0]):
        for part in PARTS[label]:
            assert (shown[index] == PART_NAMES.index(f"{CLASSES[label]}/{part}") + 1).any(), (index, part)


def test_parts_are_painted_in_their_own_colour() -> None:
    params = sample(200, 4).replace(texture=TEXTURES.index("solid"))
    full = render(params)
    palette = np.array(list(COLORS.values()))
    for index, label in enumerate(params.objects[:, 0]):
        for slot, part in enumerate(PARTS[label]):
            pixels = full.images[index][:, full.part_map[index] == PART_NAMES.index(f"{CLASSES[label]}/{part}") + 1]
            if pixels.shape[1] >= 30:  # enough of it is not edge
                expected = 255 * palette[params.color[index, 0, slot]]
                assert np.abs(np.median(pixels, 1) - expected).max() < 25, (index, part)


def test_the_watermark_is_seen_inside_its_box_and_off_the_border() -> None:
    params = sample(300, 7)
    before, after = render(params), render(params.replace(watermark=True))
    box = after.watermark_mask
    assert (box.sum((1, 2)) == 8 * 12).all()
    assert not (changed(before, after) & ~box).any()
    assert changed(before, after)[box].mean() > 0.9
    inner = np.zeros((SIZE, SIZE), bool)
    inner[WATERMARK_MARGIN:-WATERMARK_MARGIN, WATERMARK_MARGIN:-WATERMARK_MARGIN] = True
    assert WATERMARK_MARGIN >= 8
    assert not box[:, ~inner].any()
    assert box[:, 8].any() and box[:, -9].any() and box[:, :, 8].any() and box[:, :, -9].any()


def test_single_objects_are_off_centre_and_pairs_apart() -> None:
    single, double = sample(3000, 8), sample(3000, 8, two_object=1.0)
    middle = (SIZE - 1) / 2
    offset = np.abs(single.center[:, 0] - middle).max(1)
    assert MIN_OFFSET >= 10
    assert offset.min() >= MIN_OFFSET - 1e-3
    edge = 0.95 * single.scale[:, 0, None]
    assert (single.center[:, 0] - edge).min() >= -1e-3
    assert (single.center[:, 0] + edge).max() <= SIZE - 1 + 1e-3
    gap = np.abs(double.center[:, 0] - double.center[:, 1]).max(1)
    assert (gap >= 0.95 * double.scale.sum(1)).all()
    # A blob in the middle must not find the object: at most 30% cover the centre, 22% of 2,048 did.
    assert render(single, range(500)).object_masks[:, 0, 31:33, 31:33].any((1, 2)).mean() < 0.3


def test_attributes_say_nothing_about_the_class() -> None:
    params = sample(12_000, 9)
    for name, choices in (("color", len(COLORS)), ("texture", len(TEXTURES)), ("background", 3)):
        attribute = getattr(params, name).reshape(len(params), -1)[:, 0]
        table = np.zeros((len(CLASSES), choices))
        np.add.at(table, (params.objects[:, 0], attribute), 1)
        expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
        freedom = (len(CLASSES) - 1) * (choices - 1)
        # A chi-square statistic has mean `freedom` and variance twice that; four standard deviations.
        assert ((table - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5, name


def test_parts_of_an_object_differ_in_colour_and_the_classes_of_a_pair_differ() -> None:
    params = sample(1000, 9)
    assert all(len(set(colors)) == 3 for colors in params.color.reshape(-1, 3).tolist())
    assert (params.objects[:, 0] != params.objects[:, 1]).all()


def test_names() -> None:
    assert len(CLASSES) == len(PARTS) == 12
    assert len(PART_NAMES) == len(set(PART_NAMES)) == 27
    assert PART_NAMES[0] == "house/wall"


# The data set.


def test_items_and_truth_as_tensors() -> None:
    scenes = demo_scenes(60, 1, two_object=0.5, watermark=0.5, mislabelled=0.5)
    image, label = scenes[7]
    assert image.dtype == torch.uint8 and image.shape == (3, 64, 64)
    assert type(label) is int
    assert torch.equal(image, scenes.images[7])
    assert [scenes[index][1] for index in range(60)] == scenes.labels.tolist()
    assert scenes.images.dtype == torch.uint8 and scenes.images.shape == (60, 3, 64, 64)
    assert scenes.masks.dtype == torch.bool and scenes.masks.shape == (60, 2, 64, 64)
    assert scenes.parts.dtype == torch.uint8 and scenes.parts.shape == (60, 64, 64)
    assert scenes.watermark_masks.dtype == torch.bool and scenes.watermark_masks.shape == (60, 64, 64)
    assert torch.equal(scenes.mislabelled, scenes.labels != scenes.true_labels)
    assert torch.equal(scenes.second_labels >= 0, torch.from_numpy(scenes.params.n_objects == 2))
    assert torch.equal(scenes.masks[:, 1].flatten(1).any(1), scenes.second_labels >= 0)
    assert scenes.classes == CLASSES


def test_an_item_is_a_copy() -> None:
    scenes = demo_scenes(3, 1)
    scenes[0][0].zero_()
    assert scenes[0][0].any()


def test_iteration_ends() -> None:
    scenes = demo_scenes(3, 1)
    assert len(list(itertools.islice(iter(scenes), 5))) == 3  # type: ignore[call-overload]
    with pytest.raises(IndexError):
        demo_scenes(3, 1)[3]


def test_rendering_waits_for_first_use_and_happens_once() -> None:
    scenes = demo_scenes(100_000, 1)
    assert len(scenes) == 100_000
    few = Scenes(sample(4, 1))
    assert few.images.data_ptr() == few.images.data_ptr()


def test_data_loader_with_workers() -> None:
    scenes = demo_scenes(40, 1)
    batches = list(DataLoader(scenes, batch_size=16, num_workers=2))
    assert torch.equal(torch.cat([images for images, _ in batches]), scenes.images)
    assert torch.equal(torch.cat([labels for _, labels in batches]), scenes.labels)


@pytest.mark.parametrize("used", [False, True])
def test_pickle(used: bool) -> None:
    scenes = demo_scenes(4, 1)
    if used:
        assert scenes.images.any()
    assert torch.equal(pickle.loads(pickle.dumps(scenes)).images, scenes.images)


@pytest.mark.parametrize(
    "options",
    [{"n": 0}, {"seed": -1}, {"two_object": 1.1}, {"watermark": -0.1}, {"mislabelled": 2}, {"backdoor": float("nan")}],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(options))):
        demo_scenes(**{"n": 4, **options})


@pytest.mark.parametrize("indices", [[-1], [0, 4]])
def test_bad_indices(indices: list[int]) -> None:
    with pytest.raises(BadInput, match="0 to 3"):
        render(sample(4, 0), indices)


def test_rendering_is_fast() -> None:
    params = sample(512, 0)
    render(params, [0])
    start = time.process_time()
    render(params)
    # About 1,000 scenes a second on one core; a loaded machine may halve that twice.
    assert 512 / (time.process_time() - start) > 250


# scikit-learn's part.


def test_digits_and_photos() -> None:
    images, labels = sklearn.digits()
    assert images.shape == (1797, 8, 8) and images.dtype == np.float32
    assert images.min() == 0 and images.max() == 1
    assert labels.shape == (1797,) and set(labels) == set(range(10))
    photos = sklearn.sample_photos()
    assert [photo.shape for photo in photos] == [(427, 640, 3)] * 2
    assert all(photo.dtype == np.uint8 for photo in photos)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependency, match="pip install"):
        sklearn.digits()
