"""The families of the coverage table."""

from __future__ import annotations

from .encoders import ENCODERS
from .family import Family
from .handwritten import HANDWRITTEN
from .language_models import LANGUAGE_MODELS

FAMILIES: tuple[Family, ...] = (*LANGUAGE_MODELS, *ENCODERS, *HANDWRITTEN)
BY_NAME = {family.name: family for family in FAMILIES}
