"""The cache of images: built once, found by name, kept while there is room."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path

import pytest

from warmcell.sandbox.errors import (
    CapacityError,
    ConflictError,
    ImageBuildError,
    ImageNotFoundError,
    InvalidRequestError,
    UnsupportedOperationError,
)
from warmcell.sandbox.images.base import Built, Output, Tell
from warmcell.sandbox.images.cache import ImageCache
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.images.steps import AptInstall, Run
from warmcell.sandbox.models import SandboxSpec

PLAIN = Image.python("3.12")


class Shelf:
    """A builder in memory: each image is as many bytes large as its last command says."""

    name = "shelf"
    references = False

    def __init__(self) -> None:
        self.there: dict[str, Built] = {}
        self.built: list[str] = []
        self.go = asyncio.Event()
        self.go.set()
        self.began = asyncio.Event()
        self.may_go = asyncio.Event()
        self.may_go.set()
        self.going = asyncio.Event()
        self.looked = asyncio.Event()
        self.may_tell = asyncio.Event()
        self.may_tell.set()
        self.refuses = False

    async def open(self, known: Collection[str] | None) -> None:
        if known is None:
            return
        self.there = {digest: built for digest, built in self.there.items() if digest in known}

    def check(self, image: Image) -> None:
        if any(isinstance(step, AptInstall) for step in image.steps):
            raise UnsupportedOperationError("No.", hint="Do not.")

    async def find(self, digest: str) -> Built | None:
        self.looked.set()
        await self.may_tell.wait()
        return self.there.get(digest)

    async def build(self, image: Image, *, tell: Tell, again: bool = False) -> Built:
        self.built.append(str(image))
        tell("first")
        self.began.set()
        await self.go.wait()
        tell("last")
        (*_, step) = image.steps
        assert isinstance(step, Run)
        if step.command == "fail":
            raise Output(tell).error("run", "exit code 1", exit_code=1)
        made = Built(
            digest=image.digest, reference=f"ref-{step.command}", python="/py", size_bytes=int(step.command.split()[-1])
        )
        self.there[image.digest] = made
        return made

    async def remove(self, digest: str) -> None:
        self.going.set()
        await self.may_go.wait()
        if self.refuses:
            raise ConflictError("A container uses it", hint="Remove that.")
        self.there.pop(digest, None)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
async def cache(tmp_path: Path, shelf: Shelf) -> AsyncIterator[ImageCache]:
    made = ImageCache(tmp_path / "known", {"bubblewrap": shelf, "process": shelf})
    await made.open()
    yield made
    await made.close()


def reopened(cache: ImageCache, tmp_path: Path, shelf: Shelf) -> ImageCache:
    return ImageCache(tmp_path / "known", {"bubblewrap": shelf, "process": shelf})


async def test_what_is_there_is_not_built_again(cache: ImageCache, shelf: Shelf, tmp_path: Path) -> None:
    """The same declaration is answered from what is kept, also by the next keeper and for another backend."""
    first = await cache.build(PLAIN.run("1"), backend="bubblewrap")
    again = await cache.build(PLAIN.run("1"), backend="process")
    later = reopened(cache, tmp_path, shelf)
    await later.open()
    third = await later.build(PLAIN.run("1"), backend="bubblewrap")
    assert len(shelf.built) == 1
    assert first.digest == again.digest == third.digest == PLAIN.run("1").digest
    assert first.created_at == third.created_at
    assert later.info(first.digest[7:19]).made_of == "python 3.12 → run 1"


async def test_it_is_built_again_where_that_is_asked_for(cache: ImageCache, shelf: Shelf) -> None:
    """What a declaration stands for can change in the world: a new build is had on demand."""
    await cache.build(PLAIN.run("1"), backend="bubblewrap", name="a")
    info = await cache.build(PLAIN.run("1"), backend="bubblewrap", again=True)
    assert len(shelf.built) == 2
    assert info.names == ("a",)


async def test_two_who_ask_for_one_image_wait_for_one_build(cache: ImageCache, shelf: Shelf) -> None:
    """And the one who comes later hears what has been said before."""
    shelf.go.clear()
    told: dict[str, list[str]] = {"one": [], "other": []}
    one = asyncio.create_task(cache.build(PLAIN.run("1"), backend="bubblewrap", tell=told["one"].append))
    await shelf.began.wait()
    other = asyncio.create_task(cache.build(PLAIN.run("1"), backend="process", tell=told["other"].append))
    await asyncio.sleep(0)
    shelf.go.set()
    assert await one == await other
    assert len(shelf.built) == 1
    assert told["one"] == told["other"] == ["first", "last"]


async def test_a_build_goes_on_while_anybody_waits_and_ends_with_the_last(cache: ImageCache, shelf: Shelf) -> None:
    """Who is cancelled alone ends a build; who is cancelled beside another does not."""
    shelf.go.clear()
    one = asyncio.create_task(cache.build(PLAIN.run("1"), backend="bubblewrap"))
    await shelf.began.wait()
    other = asyncio.create_task(cache.build(PLAIN.run("1"), backend="bubblewrap"))
    await asyncio.sleep(0)
    one.cancel()
    await asyncio.gather(one, return_exceptions=True)
    assert cache.building
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)
    assert not cache.building
    assert cache.infos() == []
    shelf.go.set()
    assert (await cache.build(PLAIN.run("1"), backend="bubblewrap")).size_bytes == 1


async def test_who_waits_as_all_ends_is_told(cache: ImageCache, shelf: Shelf) -> None:
    """A keeper that ends gives builds up with an error, not with silence."""
    shelf.go.clear()
    one = asyncio.create_task(cache.build(PLAIN.run("1"), backend="bubblewrap"))
    await shelf.began.wait()
    await cache.close()
    with pytest.raises(ConflictError, match="given up"):
        await one


async def test_a_failed_build_leaves_nothing_and_can_be_repeated(cache: ImageCache, shelf: Shelf) -> None:
    """It is listed nowhere, and the next try is a build of its own."""
    for _ in range(2):
        with pytest.raises(ImageBuildError) as caught:
            await cache.build(PLAIN.run("fail"), backend="bubblewrap", name="a")
        assert caught.value.details["exit_code"] == 1
    assert len(shelf.built) == 2
    assert cache.infos() == []
    with pytest.raises(ImageNotFoundError):
        cache.info("a")


async def test_a_name_moves_to_the_newest_image_of_that_name(cache: ImageCache, tmp_path: Path, shelf: Shelf) -> None:
    """As with tags: what was called so before stays, by its digest."""
    first = await cache.build(PLAIN.run("1"), backend="bubblewrap", name="a")
    second = await cache.build(PLAIN.run("2"), backend="bubblewrap", name="a")
    later = reopened(cache, tmp_path, shelf)
    await later.open()
    assert cache.info("a").digest == later.info("a").digest == second.digest
    assert later.info(first.digest).names == ()


async def test_an_image_can_begin_with_a_named_one(cache: ImageCache, shelf: Shelf) -> None:
    """What that is made of is looked up at the build, so the digest is that of the whole."""
    await cache.build(PLAIN.run("1"), backend="bubblewrap", name="base")
    more = await cache.build(Image.from_name("base").run("2"), backend="bubblewrap", name="more")
    assert more.digest == PLAIN.run("1").run("2").digest
    assert (await cache.build(Image.from_name("more"), backend="bubblewrap")).digest == more.digest
    with pytest.raises(ImageNotFoundError, match="nothing"):
        await cache.build(Image.from_name("nothing"), backend="bubblewrap")


async def test_what_cannot_be_built_fails_before_anything_is_made(cache: ImageCache, shelf: Shelf) -> None:
    """The builder refuses first, and a backend or name that is none never reaches it."""
    with pytest.raises(UnsupportedOperationError):
        await cache.build(PLAIN.apt_install("git"), backend="bubblewrap")
    with pytest.raises(InvalidRequestError, match="no images for the backend 'vm'"):
        await cache.build(PLAIN.run("1"), backend="vm")
    with pytest.raises(InvalidRequestError, match="cannot be the name"):
        await cache.build(PLAIN.run("1"), backend="bubblewrap", name="A/b")
    assert shelf.built == []


async def test_a_spec_gets_interpreter_and_variables_of_its_image(cache: ImageCache) -> None:
    """By name or digest; what the spec itself says goes before, and a second look changes nothing."""
    info = await cache.build(PLAIN.env(A="1", B="2").run("1"), backend="bubblewrap", name="a")
    spec = SandboxSpec(python="", image="a", env={"B": "3"})
    found = await cache.resolve(spec, "bubblewrap")
    assert (found.image, found.python, found.env) == ("ref-1", "/py", {"A": "1", "B": "3"})
    assert await cache.resolve(found, "bubblewrap") == found
    assert (await cache.resolve(SandboxSpec(python="", image=info.digest), "process")).python == "/py"
    plain = SandboxSpec(python="/usr/bin/python3")
    assert await cache.resolve(plain, "bubblewrap") is plain


async def test_an_image_that_is_not_there_is_said_to_be_missing(cache: ImageCache, shelf: Shelf) -> None:
    """Never built, or removed behind our back: the error names it, and an engine's own images pass."""
    with pytest.raises(ImageNotFoundError, match="No image a was built"):
        await cache.resolve(SandboxSpec(python="", image="a"), "bubblewrap")
    await cache.build(PLAIN.run("1"), backend="bubblewrap", name="a")
    shelf.there.clear()
    with pytest.raises(ImageNotFoundError, match="not there any more"):
        await cache.resolve(SandboxSpec(python="", image="a"), "bubblewrap")
    shelf.references = True
    foreign = SandboxSpec(python="", image="debian:12")
    assert await cache.resolve(foreign, "bubblewrap") is foreign
    assert await cache.resolve(foreign, "elsewhere") is foreign


async def limited(tmp_path: Path, shelf: Shelf, most: int, in_use: Callable[[], list[str]] = list) -> ImageCache:
    made = ImageCache(tmp_path / "known", {"bubblewrap": shelf}, quota_bytes=most, in_use=in_use)
    await made.open()
    return made


async def test_what_was_used_longest_ago_goes_first(tmp_path: Path, shelf: Shelf) -> None:
    """Under a cap, the newest build and what a kernel has started on lately stay; times survive the keeper."""
    cache = await limited(tmp_path, shelf, 30)
    for size in ("10", "x 10", "y 10"):
        await cache.build(PLAIN.run(size), backend="bubblewrap")
        await asyncio.sleep(0.01)  # apart in time, as file systems tell it
    await cache.resolve(SandboxSpec(python="", image="ref-10"), "bubblewrap")
    cache = await limited(tmp_path, shelf, 30)
    await cache.build(PLAIN.run("z 10"), backend="bubblewrap")
    assert {info.reference for info in cache.infos()} == {"ref-10", "ref-y 10", "ref-z 10"}
    assert {built.reference for built in shelf.there.values()} == {"ref-10", "ref-y 10", "ref-z 10"}


async def test_what_is_in_use_is_never_removed(tmp_path: Path, shelf: Shelf) -> None:
    """Neither to make room nor on demand, by whatever of its names it is used."""
    used: list[str] = ["kept"]
    cache = await limited(tmp_path, shelf, 15, lambda: used)
    await cache.build(PLAIN.run("10"), backend="bubblewrap", name="kept")
    await cache.build(PLAIN.run("x 10"), backend="bubblewrap")
    assert {info.reference for info in cache.infos()} == {"ref-10", "ref-x 10"}
    for name in ("kept", PLAIN.run("10").digest, "ref-10"):
        used[:] = [name]
        with pytest.raises(ConflictError, match="in use"):
            await cache.remove("kept")
        with pytest.raises(ConflictError, match="in use"):
            await cache.build(PLAIN.run("10"), backend="bubblewrap", again=True)
    used.clear()
    await cache.remove("kept")
    with pytest.raises(ImageNotFoundError):
        await cache.remove("kept")
    assert list(shelf.there) == [PLAIN.run("x 10").digest]


async def test_what_is_being_taken_is_not_removed_meanwhile(tmp_path: Path, shelf: Shelf) -> None:
    """A start that has found its image gets it, though nothing names that image as used yet.

    Not even where the name is given to another image in this very moment.
    """
    cache = await limited(tmp_path, shelf, 15)
    info = await cache.build(PLAIN.run("10"), backend="bubblewrap", name="a")
    shelf.may_tell.clear()
    shelf.looked.clear()
    start = asyncio.create_task(cache.resolve(SandboxSpec(python="", image="a"), "bubblewrap"))
    await shelf.looked.wait()
    with pytest.raises(ConflictError, match="in use"):
        await cache.remove("a")
    shelf.looked.clear()
    build = asyncio.create_task(cache.build(PLAIN.run("x 10"), backend="bubblewrap", name="a"))
    await shelf.looked.wait()
    shelf.may_tell.set()
    assert (await start).image == info.reference
    assert info.digest in shelf.there
    await build


async def test_a_start_waits_for_what_becomes_of_its_image(tmp_path: Path, shelf: Shelf) -> None:
    """One that is being removed is either gone, which is said, or it stays, and then the start has it."""
    cache = await limited(tmp_path, shelf, 15)
    await cache.build(PLAIN.run("10"), backend="bubblewrap", name="a")
    for refuses in (True, False):
        shelf.refuses = refuses
        shelf.may_go.clear()
        shelf.going.clear()
        removal = asyncio.create_task(cache.remove("a"))
        await shelf.going.wait()
        start = asyncio.create_task(cache.resolve(SandboxSpec(python="", image="a"), "bubblewrap"))
        again = asyncio.create_task(cache.build(PLAIN.run("10"), backend="bubblewrap")) if not refuses else None
        await asyncio.sleep(0.01)
        assert not start.done()
        shelf.may_go.set()
        if refuses:
            with pytest.raises(ConflictError, match="A container uses it"):
                await removal
            assert (await start).image == "ref-10"
        else:
            await removal
            with pytest.raises(ImageNotFoundError):
                await start
            assert again is not None
            assert (await again).names == ()
            assert len(shelf.built) == 2
            assert cache.info("ref-10").digest in shelf.there


async def test_a_removal_that_nobody_waits_for_any_more_comes_to_its_end(tmp_path: Path, shelf: Shelf) -> None:
    """Else there would be a record without an image, or an image without a record."""
    cache = await limited(tmp_path, shelf, 15)
    await cache.build(PLAIN.run("10"), backend="bubblewrap", name="a")
    shelf.may_go.clear()
    shelf.going.clear()
    removal = asyncio.create_task(cache.remove("a"))
    await shelf.going.wait()
    removal.cancel()
    await asyncio.gather(removal, return_exceptions=True)
    shelf.may_go.set()
    await cache.close()
    assert (cache.infos(), shelf.there) == ([], {})


async def test_a_name_is_taken_from_none_that_is_being_removed(cache: ImageCache, shelf: Shelf, tmp_path: Path) -> None:
    """What is written of it then would outlive it. If it stays it has lost the name."""
    for refuses in (False, True):
        await cache.build(PLAIN.run("old 1"), backend="bubblewrap", name="a")
        shelf.refuses = refuses
        shelf.may_go.clear()
        shelf.going.clear()
        removal = asyncio.create_task(cache.remove("a"))
        await shelf.going.wait()
        build = asyncio.create_task(cache.build(PLAIN.run("new 1"), backend="bubblewrap", name="a"))
        await asyncio.wait({build}, timeout=0.1)
        shelf.may_go.set()
        await asyncio.gather(removal, return_exceptions=True)
        new = await build
        later = reopened(cache, tmp_path, shelf)
        await later.open()
        for known in (cache, later):
            assert {info.digest for info in known.infos()} == set(shelf.there)
            assert known.info("a").digest == new.digest
        shelf.refuses = False
        await cache.remove("a")


async def test_what_was_just_built_is_not_trimmed_by_another_build(tmp_path: Path, shelf: Shelf) -> None:
    """Two that end at once leave two images, each with its name, or the one that came last."""
    cache = await limited(tmp_path, shelf, 15)
    infos = await asyncio.gather(
        *(cache.build(PLAIN.run(f"{name} 10"), backend="bubblewrap", name=name) for name in ("a", "b"))
    )
    known = {info.digest for info in cache.infos()}
    assert known == set(shelf.there)
    assert known & {info.digest for info in infos}


async def test_an_image_is_in_use_by_whatever_it_was_asked_for(tmp_path: Path, shelf: Shelf) -> None:
    """Lists show the beginning of a digest, and so kernels are started by it."""
    used: list[str] = []
    cache = await limited(tmp_path, shelf, 15, lambda: used)
    info = await cache.build(PLAIN.run("10"), backend="bubblewrap")
    used.append(info.digest[7:19])
    await cache.build(PLAIN.run("x 10"), backend="bubblewrap")
    assert info.digest in shelf.there


async def test_what_is_built_anew_is_not_started_meanwhile(cache: ImageCache, shelf: Shelf) -> None:
    """Its directory is about to be another one; an engine's containers keep what they have."""
    await cache.build(PLAIN.run("1"), backend="bubblewrap", name="a")
    shelf.go.clear()
    shelf.began.clear()
    build = asyncio.create_task(cache.build(PLAIN.run("1"), backend="bubblewrap", again=True))
    await shelf.began.wait()
    spec = SandboxSpec(python="", image="a")
    with pytest.raises(ConflictError, match="being built anew"):
        await cache.resolve(spec, "bubblewrap")
    shelf.references = True
    assert (await cache.resolve(spec, "bubblewrap")).image == "ref-1"
    shelf.go.set()
    await build


async def test_two_names_that_are_given_at_once_are_both_kept(cache: ImageCache, shelf: Shelf) -> None:
    """Two wait for one build, and each calls the image something else."""
    shelf.go.clear()
    builds = [asyncio.create_task(cache.build(PLAIN.run("1"), backend="bubblewrap", name=name)) for name in "ab"]
    await shelf.began.wait()
    shelf.go.set()
    await asyncio.gather(*builds)
    assert set(cache.infos()[0].names) == {"a", "b"}


async def test_a_beginning_of_a_digest_must_say_which(cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images may share it; one is never taken for the other."""
    for command in ("1", "2"):
        monkeypatch.setattr(Image, "digest", property(lambda image, command=command: f"sha256:abcdef{command * 58}"))
        await cache.build(PLAIN.run(command), backend="bubblewrap")
    with pytest.raises(ConflictError, match="Several"):
        cache.info("abcdef")
    assert cache.info("abcdef2").reference == "ref-2"


async def test_a_broken_record_is_none(cache: ImageCache, shelf: Shelf, tmp_path: Path) -> None:
    """What is known of other images stays, no image goes for it, and the image itself is found again."""
    await cache.build(PLAIN.run("1"), backend="bubblewrap")
    await cache.build(PLAIN.run("2"), backend="bubblewrap")
    (broken,) = (path for path in (tmp_path / "known").iterdir() if PLAIN.run("1").digest[7:19] in path.name)
    broken.write_text("{")
    (tmp_path / "known" / ".half").write_text("{")
    later = reopened(cache, tmp_path, shelf)
    await later.open()
    assert [info.reference for info in later.infos()] == ["ref-2"]
    await later.build(PLAIN.run("1"), backend="bubblewrap")
    assert len(shelf.built) == 2
    assert not (tmp_path / "known" / ".half").exists()


async def test_a_full_disk_says_so(cache: ImageCache, tmp_path: Path) -> None:
    """Where not even the record can be written the error is that of a full disk."""
    (tmp_path / "known").rmdir()
    with pytest.raises(CapacityError, match="cannot be written"):
        await cache.build(PLAIN.run("1"), backend="bubblewrap")


async def test_what_has_no_record_is_cleared_away(cache: ImageCache, shelf: Shelf, tmp_path: Path) -> None:
    """What a killed keeper had built but not noted down would else take room for ever."""
    await cache.build(PLAIN.run("1"), backend="bubblewrap")
    await shelf.build(PLAIN.run("2"), tell=lambda line: None)
    await reopened(cache, tmp_path, shelf).open()
    assert list(shelf.there) == [PLAIN.run("1").digest]
