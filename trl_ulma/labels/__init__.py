"""Labels: the schema of a pointwise row, transforms of its label, and the report on all labels."""

from trl_ulma.labels.invalid_rows import (
    LISTED,
    InvalidRow,
    InvalidRows,
    are_ratings,
    list_invalid,
    look_like_ratings,
    places,
    refuse_invalid,
    unread,
)
from trl_ulma.labels.missing import are_missing, is_missing
from trl_ulma.labels.raters import MOST_RATERS, raters_in_words
from trl_ulma.labels.report import (
    contradictions_in_words,
    label_report,
    outliers_in_words,
    repeats,
)
from trl_ulma.labels.report_text import render_repeats, render_report
from trl_ulma.labels.rows import (
    ASKING_ROLES,
    DECIMAL_COMMA,
    LABEL_TYPES,
    OPTIONAL_COLUMNS,
    WERE_RATINGS,
    LabelRules,
    check_columns,
    check_texts,
    is_date,
    one_class,
    raw_labels,
    read_labels,
    transform_labels,
    worded_number,
)
from trl_ulma.labels.texts import is_empty, is_messages, shown, start_of
from trl_ulma.labels.transforms import TRANSFORMS, LabelTransform, parse_transform, with_centered_raters

__all__ = [
    "ASKING_ROLES",
    "DECIMAL_COMMA",
    "LABEL_TYPES",
    "LISTED",
    "MOST_RATERS",
    "OPTIONAL_COLUMNS",
    "TRANSFORMS",
    "WERE_RATINGS",
    "InvalidRow",
    "InvalidRows",
    "LabelRules",
    "LabelTransform",
    "are_missing",
    "are_ratings",
    "check_columns",
    "check_texts",
    "contradictions_in_words",
    "is_date",
    "is_empty",
    "is_messages",
    "is_missing",
    "label_report",
    "list_invalid",
    "look_like_ratings",
    "one_class",
    "outliers_in_words",
    "parse_transform",
    "places",
    "raters_in_words",
    "raw_labels",
    "read_labels",
    "refuse_invalid",
    "render_repeats",
    "render_report",
    "repeats",
    "shown",
    "start_of",
    "transform_labels",
    "unread",
    "with_centered_raters",
    "worded_number",
]
