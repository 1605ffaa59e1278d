"""Declarations that tests draw."""

import string

from hypothesis import strategies as st

from warmcell.sandbox.images.image import Image

NASTY = "\"'\\$`#<>&|;%{}()[]*?!~ \t\n\réあ\U0001f40d\u2028"

packages = st.sampled_from(
    ["numpy", "pandas>=2", "torch==2.8.0", "uvicorn[standard]", 'tomli; python_version < "3.11"']
)
debian = st.sampled_from(["ffmpeg", "git=1:2.39.5-0+deb12u2", "libc6:i386", "g++"])
commands = st.text(alphabet=string.ascii_letters + NASTY, min_size=1, max_size=60).filter(str.strip)
values = st.text(alphabet=string.ascii_letters + NASTY.translate({9: None, 10: None, 13: None}), max_size=40)
names = st.text(alphabet=string.ascii_letters + "_", min_size=1, max_size=10)


@st.composite
def images(draw: st.DrawFn) -> Image:
    """Any declaration of steps above a plain Python or an image of an engine's."""
    image = draw(
        st.sampled_from(
            [
                Image.python("3.12"),
                Image.python("3.9", kernel=False),
                Image.from_registry("debian:12"),
                Image.conda(
                    "python=3.12", "bioconda::samtools>=1.2,<2", "x=1=h*", channels=["own", "https://a.test/b"]
                ),
            ]
        )
    )
    for verb in draw(st.lists(st.sampled_from(["pip", "apt", "run", "env"]), max_size=6)):
        match verb:
            case "pip":
                image = image.pip_install(*draw(st.lists(packages, min_size=1, max_size=3)))
            case "apt":
                image = image.apt_install(*draw(st.lists(debian, min_size=1, max_size=3)))
            case "run":
                image = image.run(draw(commands))
            case "env":
                image = image.env(draw(st.dictionaries(names, values, min_size=1, max_size=3)))
    return image
