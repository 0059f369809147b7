"""Training, prediction and the demo: what the command line is made of.

from fused_resnet.train import TrainOptions, train
train(TrainOptions(model="resnet18", data="pictures", epochs=10))
"""

from fused_resnet.train.errors import CheckpointError, DataError, DivergedError, OptionError, UserError
from fused_resnet.train.options import TrainOptions
from fused_resnet.train.predict import Classifier, Prediction
from fused_resnet.train.run import Summary, train

__all__ = [
    "CheckpointError",
    "Classifier",
    "DataError",
    "DivergedError",
    "OptionError",
    "Prediction",
    "Summary",
    "TrainOptions",
    "UserError",
    "train",
]
