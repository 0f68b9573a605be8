"""The dashboards, as data; generate.py makes JSON of them."""

from boards.fleet import FLEET
from boards.models import MODELS
from boards.platform import PLATFORM
from boards.tenants import TENANTS

BOARDS = (FLEET, MODELS, TENANTS, PLATFORM)
