"""The Serve application: `import_path: cluster.serve_app:app` for `serve deploy`, and for a RayService of KubeRay.

Its `args` are the options of `expertmesh serve`, under the names that a YAML file has for them.
"""

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, create_model
from ray.serve import Application

from cluster.config_load import FIELDS
from cluster.fleet.serve_cluster import application

if TYPE_CHECKING:
    Args = BaseModel
else:
    # Values are checked where those of a YAML file are, with the same words.
    Args = create_model("Args", __config__=ConfigDict(extra="forbid"), **dict.fromkeys(FIELDS, (Any, None)))


def app(args: Args) -> Application:
    """The gateways of a cluster, whose controller starts all other processes, see `cluster.fleet.serve_cluster`."""
    return application({name: value for name, value in args.model_dump().items() if value is not None})
