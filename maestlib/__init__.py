"""maestlib: MAEST, the Music Audio Efficient Spectrogram Transformer, as an interactive research package.

The only hand-written module. Everything is imported when it is first used, so that `import maestlib` is light; what there
is to import is in `__init__.pyi`, which type checkers read, too.
"""

import lazy_loader

__version__ = "0.1.0"

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name):
    value = _load(name)
    if not name.startswith("__"):
        from .core.docs import append_docments  # imported late: `import maestlib` stays light

        globals()[name] = append_docments(value)
    return value
