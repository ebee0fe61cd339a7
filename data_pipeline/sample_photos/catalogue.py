"""What `bitdance data sample` writes: pictures of the scikit-image wheel, their captions and their scores.

The captions are ours. The scores are **made up**, in the ranges that the real predictors give: they are
there so that a filter has something to decide on. The pictures under `REJECTS` are there to be filtered
out, each for another reason.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One picture of scikit-image's data folder.

    Attributes:
        file: name in the wheel's `skimage/data`.
        caption: one sentence.
        aesthetic: as LAION's aesthetic predictor would score it, 1 to 10.
        similarity: cosine of caption and picture, as CLIP would give it.
        watermark: probability of a watermark.
        unsafe: probability of unsafe content.
    """

    file: str
    caption: str
    aesthetic: float
    similarity: float
    watermark: float = 0.04
    unsafe: float = 0.01


PHOTOS = (
    Entry("astronaut.png", "An astronaut in an orange suit smiles before a flag and a shuttle.", 6.6, 0.36),
    Entry("brick.png", "A grey brick wall in low light, seen at an angle.", 5.1, 0.31),
    Entry("camera.png", "A man in a dark coat films with a camera on a tripod in a field.", 6.1, 0.34),
    Entry("cell.png", "A single bright cell floats on a dark grey background.", 4.9, 0.29),
    Entry("chelsea.png", "A close portrait of a tabby cat with green eyes.", 6.8, 0.37),
    Entry("clock_motion.png", "A round clock blurred by motion on a pale wall.", 4.7, 0.28),
    Entry("coffee.png", "A cup of espresso on a red saucer with a spoon on a wooden table.", 6.9, 0.38),
    Entry("coins.png", "Rows of ancient Greek coins on a black cloth.", 5.4, 0.35),
    Entry("hubble_deep_field.jpg", "Thousands of distant galaxies glitter in deep black space.", 6.4, 0.33),
    Entry("ihc.png", "Stained tissue under a microscope, brown glands among blue nuclei.", 5.2, 0.30),
    Entry("moon.png", "Craters on the grey surface of the moon.", 5.5, 0.33),
    Entry("motorcycle_left.png", "A red motorcycle stands in a cluttered garage.", 5.9, 0.36),
    Entry("retina.jpg", "The orange back of an eye with branching blood vessels.", 5.3, 0.31),
    Entry("rocket.jpg", "A white rocket stands on its launch pad at dusk.", 6.7, 0.37),
)

REJECTS = (
    Entry("grass.png", "Short dry grass fills the whole frame.", 4.2, 0.30),  # a texture: aesthetic score
    Entry("gravel.png", "A bed of small grey pebbles seen from above.", 4.3, 0.32),  # the same
    Entry("page.png", "A scanned page of a manual about segmentation.", 4.6, 0.29),  # shorter side below 256
    Entry("text.png", "Handwritten formulas on squared paper.", 4.6, 0.27),  # shorter side below 256
    Entry("chessboard_RGB.png", "A black and white chessboard pattern.", 4.5, 0.30),  # too small
    Entry("microaneurysms.png", "A crop of a retina scan.", 4.5, 0.25),  # too small
    Entry("phantom.png", "A synthetic phantom for tomography.", 3.1, 0.24),  # no photograph: aesthetic score
    Entry("color.png", "A wheel of all colours.", 3.9, 0.28),  # no photograph: aesthetic score
    Entry("logo.png", "The logo of scikit-image, a snake's head.", 4.8, 0.30, watermark=0.93),  # watermark
    Entry("horse.png", "horse", 4.6, 0.26),  # caption of a single word
    Entry(
        "motorcycle_right.png", "A red motorcycle stands in a cluttered garage.", 5.8, 0.12
    ),  # low similarity
)
