"""An image with nothing in it, for containers that use nothing of theirs: made here, so that no registry is asked."""

import contextlib
from collections.abc import Mapping
from typing import Any

from warmcell.sandbox.backends.docker.engine import Engine
from warmcell.sandbox.backends.docker.labels import IMAGE
from warmcell.sandbox.errors import InvalidRequestError

NAME, TAG = "warmcell-empty", "1"
CALLED = f"{NAME}:{TAG}"
ARCHIVE = bytes(10240)
"""A tar archive of no files: it ends as it begins."""
CONFLICT = 409


def image(engine: Engine) -> str:
    """Its id, made where the engine has none yet, or has another one of that name. Blocks."""
    with contextlib.suppress(InvalidRequestError):
        said = engine.image(CALLED)
        if _is_bare(said["Config"] or {}):
            return str(said["Id"])
    with engine.client() as client:
        client.import_image_from_data(ARCHIVE, repository=NAME, tag=TAG, changes=[f"LABEL {IMAGE}={NAME}"])
    return engine.image_id(CALLED)


def _is_bare(config: Mapping[str, Any]) -> bool:
    """Whether an image adds nothing to a container. Its files are used by nobody; variables and volumes would be."""
    names = {variable.partition("=")[0] for variable in config.get("Env") or ()}
    return names <= {"PATH"} and not config.get("Volumes") and IMAGE in (config.get("Labels") or {})


def remove(engine: Engine) -> bool:
    """Remove it, unless a container is of it; whether it was there. Blocks."""
    errors = engine.errors()
    with engine.client() as client:
        try:
            client.remove_image(CALLED)
        except errors.ImageNotFound:
            return False
        except errors.APIError as error:
            if error.status_code != CONFLICT:
                raise
            return False
    return True
