"""What a study's page says about the paper's figures: context, not targets.

Source: METHODS B7, B8. The paper's full text is not stored; what is said of it here comes from its
abstract and a review of it.
"""

from dinotrain.report.page import Section, Table
from dinotrain.report.text import NOTHING
from dinotrain.study.plan import Study

_TABLE = Table(
    columns=("figure", "MRD1", "MRD2", "LF"),
    rows=[
        ["frozen DINOv2 + MLP, MSE, mm² (the paper)", "0.61", "0.46", "3.41"],
        ["→ its root, mm", "0.78", "0.68", "1.85"],
        ["CNN of 2021, MAE, mm", "0.35", "0.37", "1.06"],
        ["→ MSE from its limits of agreement, mm²", "0.23", "0.25", "1.55"],
        ["→ MSE of the mean predictor at most, mm²", "1.34", "1.10", "1.39"],
        ["HRNetV2 of 2024, other eyes, MAE, mm", "0.29", "0.30", NOTHING],
    ],
    caption="Published figures (arXiv 2504.00515; Chen et al. 2021, JMIR mHealth e32444; Rana et "
    "al. 2024) and what follows from them. Of no figure here is the data set public.",
    quiet=range(6),
)


def comparability(study: Study, backbone: str, source: str) -> Section:
    """Say what is and what is not comparable with the published figures.

    Args:
        study: which one.
        backbone: that was used.
        source: of the data, in a few words.
    """
    paragraphs = (
        "The paper's figures come from a private cohort (822 eyes of 411 volunteers), those on "
        f"this page from other eyes: {source}. No figure of the one can be set beside a figure of "
        "the other, as errors depend on the eyes, the camera and the labels. What can be compared "
        "is the direction of the differences within this page: same eyes, same split, same seeds.",
        f"The paper used {study.backbone}; here the backbone is {backbone}. {study.claim}",
        "The paper states mean squared errors in mm², most others mean absolute errors in mm. A "
        "squared error of 0.61 mm² is 0.78 mm as a root, and for errors of a normal law about 0.62 "
        "mm as a mean: it must not be read as 0.61 mm.",
        "The published figures are doubtful themselves. Limits of agreement and correlation of the "
        "2021 study, which has the same counts of eyes and people, bound what a constant answer "
        "costs there: at most 1.39 mm² for LF. The paper's best LF, 3.41 mm², loses to that "
        "constant if the test sets match, and the 2021 network is better on all three distances. "
        "The paper's text was not at hand: what stands here of it is from its abstract and a "
        "review. It is context, not a target.",
    )
    return Section(
        title="What is comparable with the published figures",
        text="\n\n".join(paragraphs),
        tables=[_TABLE],
    )
