"What `import maestlib` offers: read by `__init__.py`, and by type checkers."

from . import core as core, stats as stats, audio as audio, datasets as datasets, models as models, inference as inference, training as training, probing as probing, speed as speed, paper as paper, widgets as widgets, demo as demo, collection as collection
from .audio.mel import MelConfig as MelConfig, load_audio as load_audio, logmel as logmel, normalize as normalize
from .audio.store import MelStore as MelStore, verify_store as verify_store
from .audio.extract import extract_mels as extract_mels
from .datasets.registry import load_dataset as load_dataset
from .models.patchout import Patchout as Patchout
from .models.maest import MAEST as MAEST, MAESTConfig as MAESTConfig
from .models.hub import list_models as list_models
from .models.checkpoint import load_model as load_model, save_checkpoint as save_checkpoint
from .models.publish import save_pretrained as save_pretrained, push_to_hub as push_to_hub
from .inference.embedding import embed as embed, tag as tag
from .collection.library import Library as Library
from .collection.scan import scan as scan
from .collection.search import nearest as nearest
from .collection.playlist import playlist as playlist
from .collection.write_tags import write_tags as write_tags, undo_tags as undo_tags
from .training.config import TrainConfig as TrainConfig
from .stats.metrics import evaluate as evaluate
from .probing.heads import train_head as train_head
from .training.loop import fit as fit
from .speed.tradeoff import recommend as recommend

__version__: str
