"""From a raw row to a batch: checked, rendered, tokenized and collated."""
