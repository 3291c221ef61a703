"Notebooks, texts, and code say it in the house style: no phrase and no spelling that `tools/language.py` lists."

import pytest

from project import root
from tools import language


@pytest.mark.parametrize('f', language.files(), ids=lambda o: o.relative_to(root).as_posix())
def test_file(f):
    assert language.in_file(f) == []


@pytest.mark.parametrize(
    'text,instead',
    [
        ('Mend the record', 'fix'),
        ('the run goes on after a crash', 'continues'),
        ('Who forgets one', 'leave one out'),
        ('two a layer', 'per layer'),
        ('How many parameters has VoVNet?', 'does'),
        ('the file is not there', 'does not exist'),
        ('it is put together here', 'assemble'),
        ('> After this chapter you can read', 'module contains'),
        ('def normalise(x):', 'normaliz'),
        ('the licence', 'license'),
        ('a training.', 'training run'),
    ],
)
def test_planted_phrases_are_found(text, instead):
    assert any(instead in o for o in language.found(text))


@pytest.mark.parametrize(
    'text',
    [
        'a training run',
        'the map goes on the stack',
        'it cannot be read',
        'FCOS has a center-ness branch',
        "record['licence']",
        'lay out the page',
    ],
)
def test_plain_text_is_left_alone(text):
    assert list(language.found(text)) == []
