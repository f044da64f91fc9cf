"""maestlib: MAEST, the Music Audio Efficient Spectrogram Transformer, as an interactive research package.

The only hand-written module. Everything is imported when it is first used, so that `import maestlib` is light.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "attention", "blocks", "cli", "controls", "corpus", "curate", "datasets", "downstream", "dumps",
        "effnet", "embedding", "explore", "export", "files", "hub", "layers", "mel", "metrics", "model",
        "pace", "pictures", "players", "probe", "recipe", "reduction", "runs", "settings", "speed", "splits",
        "store", "studies", "train", "tunes", "weights",
    ],
    submod_attrs={
        "mel": ["MelConfig", "decode", "logmel", "normalise"],
        "store": ["MelStore", "extract", "verify"],
        "model": ["MAEST", "Patchout"],
        "hub": ["models"],
        "weights": ["load"],
        "embedding": ["embed", "nearest", "tag"],
    },
)
