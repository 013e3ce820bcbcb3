"""Adds to the distribution the folders that stand outside its packages: grids, cluster profiles, published numbers.

They are installed as the package `next_parameter_data`; everything else is in pyproject.toml. So are the operators in
`kernels`, because Hugging Face's package has that name; `suite` makes them importable.
"""

from setuptools import find_packages, setup

DATA = {"grids": "grids", "clusters": "clusters", "results.published": "results/published"}

setup(
    packages=[
        *find_packages(include=["suite*", "analysis*"]),
        *(f"next_parameter_data.{name}" for name in DATA),
        *(f"next_parameter_data.{name}" for name in find_packages(include=["kernels*"])),
    ],
    package_dir={f"next_parameter_data.{name}": folder for name, folder in [*DATA.items(), ("kernels", "kernels")]},
)
