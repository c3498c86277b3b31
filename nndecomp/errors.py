"""The one error a user causes: a setting that cannot work."""


class SettingError(ValueError):
    """A setting has a value that cannot work. The message is one sentence: setting, value, what would be right.

    Raised before any work starts; `nndecomp.run` prints the sentence alone and exits with status 2.
    """
