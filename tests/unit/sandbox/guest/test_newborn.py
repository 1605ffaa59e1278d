"""What a process that goes on elsewhere no longer believes."""

import pytest

from warmcell.sandbox.guest.kernel import newborn


def test_a_tensor_of_before_is_not_given_for_another() -> None:
    """A file that comes after a restore may have the numbers of one before it, by which torch knows its tensors."""
    torch = pytest.importorskip("torch")
    reductions = pytest.importorskip("torch.multiprocessing.reductions")
    before = torch.arange(4).share_memory_().untyped_storage()
    fd, size = before._share_fd_cpu_()
    numbers = reductions.fd_id(fd)
    reductions.shared_cache[numbers] = reductions.StorageWeakRef(before)
    reductions.shared_cache[b"handle", 0] = reductions.StorageWeakRef(before)

    def handed_over() -> object:
        return reductions.storage_from_cache(torch.UntypedStorage, numbers)

    assert handed_over() is not None
    newborn.forget_files()
    assert handed_over() is None
    assert (b"handle", 0) in reductions.shared_cache
    assert size == before.nbytes()
    newborn.forget_files()
