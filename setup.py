"Gives the build the dependency lists of settings.ini; everything else stands in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ini = ConfigParser(delimiters=['='])
ini.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
lists = {k: v.split() for k, v in ini['DEFAULT'].items()}
extras = {k.removesuffix('_requirements'): v for k, v in lists.items() if k.endswith('_requirements')}
setup(install_requires=lists['requirements'], extras_require=extras)
