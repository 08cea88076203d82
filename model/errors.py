"""What the model package refuses or fails at."""


class ModelError(Exception):
    """Base of every error of this package."""


class InvalidFramesError(ModelError):
    """Raised when frames are not what the network or the preprocessing takes."""


class CheckpointError(ModelError):
    """Raised when a weights file is missing, damaged, of another network or not a weights file."""


class DeviceError(ModelError):
    """Raised when the device or the precision asked for is not to be had here."""


class DatasetError(ModelError):
    """Raised when a folder of tracklets is not laid out as its layout says."""
