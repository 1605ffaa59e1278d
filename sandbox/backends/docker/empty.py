"""An image with nothing in it, for containers that use nothing of theirs: made here, so that no registry is asked."""

from warmcell.sandbox.backends.docker.engine import Engine
from warmcell.sandbox.errors import InvalidRequestError

NAME, TAG = "warmcell-empty", "1"
ARCHIVE = bytes(10240)
"""A tar archive of no files: it ends as it begins."""


def image(engine: Engine) -> str:
    """Its id, made where the engine has none yet. Blocks."""
    try:
        return engine.image_id(f"{NAME}:{TAG}")
    except InvalidRequestError:
        with engine.client() as client:
            client.import_image_from_data(ARCHIVE, repository=NAME, tag=TAG)
    return engine.image_id(f"{NAME}:{TAG}")
