"""`c.Warmcell.sandboxed_only`: kernels that are not Warmcell's do not exist for this server."""

from typing import Any

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel

PROVISIONER = "warmcell"


def is_sandboxed(spec: KernelSpec) -> bool:
    """Whether kernels of this spec are started by our provisioner."""
    provisioner: Any = spec.metadata.get("kernel_provisioner", {})
    return isinstance(provisioner, dict) and provisioner.get("provisioner_name") == PROVISIONER


class SandboxedKernelSpecManager(KernelSpecManager):
    """Finds, lists and gives Warmcell kernelspecs only."""

    def find_kernel_specs(self) -> dict[str, str]:
        """Names and directories of the sandboxed ones."""
        found = super().find_kernel_specs()
        return {name: place for name, place in found.items() if self._allowed(name)}

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """One of them; `NoSuchKernel` for any other."""
        spec = super().get_kernel_spec(kernel_name)
        if not is_sandboxed(spec):
            raise NoSuchKernel(kernel_name)
        return spec

    def _allowed(self, name: str) -> bool:
        try:
            return is_sandboxed(super().get_kernel_spec(name))
        except NoSuchKernel:
            return False
