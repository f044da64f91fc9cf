"""maestlib: MAEST, the Music Audio Efficient Spectrogram Transformer, as an interactive research package.

The only hand-written module. Everything is imported when it is first used, so that `import maestlib` is light.
"""

import lazy_loader

__version__ = "0.1.0"

_load, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["core", "stats", "audio", "datasets", "models", "inference", "training", "probing", "speed", "paper", "widgets", "demo", "collection"],
    submod_attrs={
        "audio.mel": ["MelConfig", "load_audio", "logmel", "normalize"],
        "audio.store": ["MelStore", "verify_store"],
        "audio.extract": ["extract_mels"],
        "datasets.registry": ["load_dataset"],
        "models.patchout": ["Patchout"],
        "models.maest": ["MAEST", "MAESTConfig"],
        "models.hub": ["list_models"],
        "models.checkpoint": ["load_model", "save_checkpoint"],
        "models.publish": ["save_pretrained", "push_to_hub"],
        "inference.embedding": ["embed", "tag"],
        "collection.library": ["Library"],
        "collection.scan": ["scan"],
        "collection.search": ["nearest"],
        "collection.playlist": ["playlist"],
        "collection.write_tags": ["write_tags", "undo_tags"],
        "training.config": ["TrainConfig"],
        "stats.metrics": ["evaluate"],
        "probing.heads": ["train_head"],
        "training.loop": ["fit"],
        "speed.tradeoff": ["recommend"],
    },
)


def __getattr__(name):
    value = _load(name)
    if not name.startswith("__"):
        from .core.docs import append_docments  # imported late: `import maestlib` stays light

        globals()[name] = append_docments(value)
    return value
