"""Adds to the distribution the folders that stand outside its packages: grids, cluster profiles, published numbers.

They are installed as the package `next_parameter_data`; everything else is in pyproject.toml.
"""

from setuptools import find_packages, setup

DATA = {"grids": "grids", "clusters": "clusters", "results.published": "results/published"}

setup(
    packages=[
        *find_packages(include=["suite*", "kernels*", "analysis*"]),
        *(f"next_parameter_data.{name}" for name in DATA),
    ],
    package_dir={f"next_parameter_data.{name}": folder for name, folder in DATA.items()},
)
