"""Labels: the schema of a pointwise row, transforms of its label, and the report on all labels."""

from trl_ulma.labels.report import label_report, render_report
from trl_ulma.labels.rows import (
    ASKING_ROLES,
    LABEL_TYPES,
    OPTIONAL_COLUMNS,
    InvalidRow,
    LabelRules,
    check_columns,
    check_texts,
    is_empty,
    is_messages,
    list_invalid,
    one_class,
    raw_labels,
    read_labels,
    refuse_invalid,
    shown,
    start_of,
    transform_labels,
)
from trl_ulma.labels.transforms import TRANSFORMS, LabelTransform, parse_transform

__all__ = [
    "ASKING_ROLES",
    "LABEL_TYPES",
    "OPTIONAL_COLUMNS",
    "TRANSFORMS",
    "InvalidRow",
    "LabelRules",
    "LabelTransform",
    "check_columns",
    "check_texts",
    "is_empty",
    "is_messages",
    "label_report",
    "list_invalid",
    "one_class",
    "parse_transform",
    "raw_labels",
    "read_labels",
    "refuse_invalid",
    "render_report",
    "shown",
    "start_of",
    "transform_labels",
]
