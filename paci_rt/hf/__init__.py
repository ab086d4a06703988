"""Hugging Face models: cut into stages, read stage by stage, and written so that transformers reads them again."""

from __future__ import annotations

from paci_rt.hf.cut import split, stage
from paci_rt.hf.save import save_pretrained
from paci_rt.hf.stage_module import StageOfModel

__all__ = ["StageOfModel", "save_pretrained", "split", "stage"]
