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


class RecipeError(ModelError):
    """Raised when a recipe is missing, is not TOML, or says what no recipe can say."""


class TrainingError(ModelError):
    """Raised when training cannot begin, go on or resume."""


class EvaluationError(ModelError):
    """Raised when there is nothing to evaluate, or what is there cannot be compared."""


class TeacherError(ModelError):
    """Raised when a teacher network cannot be read, run, or does not fit what it is to teach."""


class ExportError(ModelError):
    """Raised when an exported file cannot be made or does not agree with the network."""
