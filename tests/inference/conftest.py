"""pytest collects every log record, and torch.export writes thousands of them for its own debugging."""

import logging

logging.getLogger("torch.__trace").disabled = True
