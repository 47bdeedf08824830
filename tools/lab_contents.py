"""What `make lab` gives JupyterLab to open: the lessons as they are, with the metadata that it would add itself.

JupyterLab writes name and version of the running kernel into a notebook as soon as it opens, and where that changes
anything, the notebook is unsaved before the reader has typed. No stored version is right for every Python.
"""

from typing import Any

from ipykernel.ipkernel import IPythonKernel
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager


class LessonContents(AsyncLargeFileManager):
    """Jupyter's own way to files, but for the metadata of the kernel."""

    async def get(self, path: str, content: bool = True, *args, **kwargs) -> dict[str, Any]:
        """The model of a file or folder, as its parent makes it."""
        model = await super().get(path, content, *args, **kwargs)
        if content and model["type"] == "notebook":
            spec = KernelSpecManager().get_kernel_spec("python3")
            kernel = {"name": "python3", "display_name": spec.display_name, "language": spec.language}
            model["content"]["metadata"] |= {"kernelspec": kernel, "language_info": IPythonKernel.language_info}
        return model
