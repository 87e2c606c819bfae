"""Extreme points that are annotated."""

import pytest
from detectron2.data import transforms as T
from mapping import HEIGHT, OTHERS, SIDES, WIDTH, annotation, boxes_of, mapper, points_of, record

from lsnet_d2.data.annotation_checks import AnnotationError

FORMS = [OTHERS, [v for p in OTHERS for v in p], [*(v for p in OTHERS for v in p), 40, 30]]


@pytest.mark.parametrize("form", FORMS)
def test_annotated_points_are_read_when_told_to(image, form):
    source = record(image, annotation(extreme_points=form))
    assert points_of(mapper(extreme_points="annotation")(source)) == [OTHERS]
    assert points_of(mapper()(source)) == [SIDES]
    flipped = mapper(T.RandomFlip(prob=1.0), extreme_points="annotation")(source)
    assert points_of(flipped) == [[[68, 10], [40, 33], [56, 50], [80, 27]]]


@pytest.mark.parametrize("source", ["segmentation", "annotation"])
def test_annotated_points_serve_objects_without_segmentation(image, source):
    boxed = annotation(segmentation=None, extreme_points=OTHERS)
    read = record(image, boxed)
    assert points_of(mapper(extreme_points=source)(read)) == [OTHERS]
    cropped = mapper(T.CropTransform(40, 0, 30, HEIGHT), extreme_points=source)(read)
    assert boxes_of(cropped) == [[0, 10, 20, 50]]
    assert points_of(cropped) == [[[0, 10], [0, 27], [4, 50], [20, 33]]]


@pytest.mark.parametrize(
    "transform",
    [T.CropTransform(40, 0, 30, HEIGHT), T.RotationTransform(HEIGHT, WIDTH, 30, expand=False)],
)
def test_annotated_points_give_way_to_the_segmentation_when_cut_or_rotated(image, transform):
    source = record(image, annotation(extreme_points=OTHERS))
    annotated = mapper(transform, extreme_points="annotation")(source)
    assert points_of(annotated) == points_of(mapper(transform)(source))


def test_annotated_points_missing_or_malformed(image):
    annotated = mapper(extreme_points="annotation")
    with pytest.raises(AnnotationError, match="annotation 7 of image .*no 'extreme_points'"):
        annotated(record(image, annotation()))
    with pytest.raises(AnnotationError, match="annotation 7 of image .*four or five points"):
        annotated(record(image, annotation(extreme_points=[1, 2, 3])))
    boxed = annotated(record(image, annotation(segmentation=None)))
    assert points_of(boxed)[0][0] == [40, 10]
