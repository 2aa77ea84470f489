"""Defaults per data set and per method.

Every value says where it is from: [code] the published code, [Liang et al. 2018] and the like the paper of a method,
[ours] chosen here.  A value set on the command line replaces the one found here.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dataset:
    """What depends on the in-distribution alone."""

    channels: int | None       # None = whatever the folder holds
    size: int | None           # images are size x size; None = --image_size
    classes: int | None
    arch: str                  # classifier                                                     [code]
    optimizer: str             # "adam" at 1e-3 or "sgd" at 0.1, momentum 0.9                   [code]
    crop: int                  # padding of the random crop, 0 = no crop                        [code]
    pad_mode: str              # "constant", "edge" or "reflect"                                [code]
    flip: bool                 # random horizontal flip                                         [code]
    ood: tuple[str, ...]       # the OOD test sets of Table 2, in the table's order             [code]
    fit_images: int | None = None       # training images that the mixture is fitted on; None = all [code]


@dataclass(frozen=True)
class Method:
    """Where a --train_type departs from its data set's way of training; None = it does not."""

    arch: dict[str, str] = field(default_factory=dict)      # the data set's classifier -> the one in its place
    optimizer: str | None = None
    lr: float | None = None    # None = LR of the optimizer
    weight_decay: float | None = None


@dataclass(frozen=True)
class TwoMoons:
    """Figure 1                                                                                 [code: its notebook]"""

    points: int = 1000
    noise: float = 0.15
    centroids: int = 50
    batch_size: int = 50
    lr: float = 0.1
    lr_gmm: float = 1e-3


TWO_MOONS = TwoMoons()

_GREY = dict(channels=1, size=28, classes=10, crop=2, pad_mode="constant", flip=False)
_LENET = dict(arch="LeNet", optimizer="adam")
_COLOUR = dict(channels=3, size=32)
_RESNET = dict(arch="ResNet18", optimizer="sgd")
NETWORKS = {"LeNet": _LENET, "ResNet18": _RESNET}     # --arch: in place of the data set's own
_CIFAR = dict(crop=4, pad_mode="reflect", flip=True, **_COLOUR, **_RESNET)

DATASETS = {
    "MNIST": Dataset(**_GREY, **_LENET,
                     ood=("FMNIST", "EMNIST", "GrayCIFAR10", "Noise", "Uniform")),
    "FMNIST": Dataset(**_GREY, **_RESNET,
                      ood=("MNIST", "EMNIST", "GrayCIFAR10", "Noise", "Uniform")),
    "SVHN": Dataset(classes=10, crop=4, pad_mode="edge", flip=False, fit_images=50_000, **_COLOUR, **_RESNET,
                    ood=("CIFAR10", "CIFAR100", "LSUN_CR", "Imagenet-", "Noise", "Uniform")),
    "CIFAR10": Dataset(classes=10, **_CIFAR,
                       ood=("SVHN", "CIFAR100", "LSUN_CR", "Imagenet-", "Noise", "Uniform")),
    "CIFAR100": Dataset(classes=100, **_CIFAR,
                        ood=("SVHN", "CIFAR10", "LSUN_CR", "Imagenet-", "Noise", "Uniform")),
    # ours: scikit-learn's digits, MNIST's list and patches of a photograph, which ship with it
    "Digits": Dataset(**_GREY, **_LENET,
                      ood=("FMNIST", "EMNIST", "GrayCIFAR10", "Patches", "Noise", "Uniform")),
    # the user's own images in --data_dir; not flipped, since they may be of digits or of text
    "Folder": Dataset(channels=None, size=None, classes=None, crop=4, pad_mode="reflect", flip=False, **_RESNET,
                      ood=("Patches", "Noise", "Uniform")),
}
IMAGE_SIZE = 32          # of Folder                                                            [ours]

# Out-distributions for training, best first.  "auto" takes the first whose file is there; Photos,
# crops of a photograph that scikit-learn brings, always is.  [80 Million Tiny Images: code]
OUT_DATASETS = ("TinyImages", "RandomImages300k", "Photos")

OUT_IMAGES = 300_000     # trained on, of a file of images                                        [ours]
OUT_CROPS = 100_000      # or crops of photos                                                     [ours]
OUT_BYTES = 2 ** 30      # but no more than fit into this                                         [ours]
OUT_TEST = 10_000        # test draws                                                             [ours]
OUT_HELD_OUT = 0.1       # share of the images, or of a folder's photos, that test draws are from [ours]
PHOTO_TRAIN = 0.8        # share of the one photograph's width, from the left, for training       [ours]

CENTROIDS = 100          # K of each mixture                                                    [code]
OUT_FIT_IMAGES = 25_000  # images the out-mixture is fitted on                                  [code]
KMEANS_IMAGES = 20_000   # k-means, only a start, sees at most this many                         [ours]
KMEANS_STEPS, KMEANS_TOL = 20, 1e-3     # and ends after so many steps, or at this tolerance         [ours]
EM_TOL, EM_STEPS = 1e-2, 100    # EM ends when the mean log-likelihood changes by less, or after so many    [ours]
REG_COVAR = 1e-3         # added to the fitted variances                       [code's library, see README]
MIN_SV_FACTOR = 1e6      # singular values are floored at the largest / this                    [code]
VAR_RATIO = 4.0          # out-variances are kept above this times the largest in-variance      [code]

EPOCHS = 100             #                                                                      [code]
BATCH_SIZE = 128         # in-images a step; out-images likewise                                [code]
MOMENTUM = 0.9           # of SGD                                                               [code]
MILESTONES = (0.5, 0.75, 0.9)   # of the epochs, learning rates x 0.1 after each                [code]
WEIGHT_DECAY = 5e-4      #                                                                      [code]
LR = {"adam": 1e-3, "sgd": 0.1, "nesterov": 0.1}  # [code; nesterov is OE's: Hendrycks et al. 2019]
LR_GMM = 1e-5            #                                                                      [code]

RATIO = 1.1              # radii are certified for a confidence of at most this / classes       [code]

ATTACK_STEPS, ATTACK_RESTARTS = 500, 50     # of Table 1                                        [code]
ATTACK_ALPHA = 3.0       # first step in tenths of the radius                   [ours; code: in the metric's units]
ATTACK_POINTS = 500      # attacked at once                                                     [ours]
ATTACK_IMAGES = 1000     # test images; a search without a gradient begins on the way to one        [ours]
ATTACK_BATCHES, ATTACK_BATCH_SIZE = 2, 100  # of seeds                                          [code]
EVAL_BATCH_SIZE = 1000   # images at a time                                                     [ours]

ACET_EPS = 0.3           # l_inf radius                                                     [Hein et al. 2019]
ACET_STEPS = 40          # gradient steps                                                       [code]

METHODS = {
    "plain": Method(), "CEDA": Method(), "ACET": Method(), "CEDA_GMM": Method(), "DE": Method(),
    "OE": Method(optimizer="nesterov"),                                         # [Hendrycks et al. 2019]
    "EDL": Method(optimizer="adam"),                                            # [ours]
    "MCD": Method({"LeNet": "LeNetDropout", "ResNet18": "VGG13"}, "adam", lr=2e-4, weight_decay=0.0),   # [code; ours]
    "GAN": Method({"ResNet18": "VGG13"}, "adam", lr=2e-4),                 # [code; Lee et al. 2018, confident]
    "ODIN": Method(), "Maha": Method(),
}
OE_WEIGHT = 0.5          # of the cross-entropy to uniform                      [Hendrycks et al. 2019]
OE_OUT_RATIO = 2         # out-images to an in-image                            [Hendrycks et al. 2019]
CALIBRATED = ("ODIN", "Maha")   # on Base, not trained
MCD_PASSES = 10          # passes with dropout at test time                                     [ours]
MEMBERS = 5              # networks of DE                           [Lakshminarayanan et al. 2017, section 3]
GAN_BETA = 1.0           # weight of KL(uniform || p) on generated images                       [ours]
GAN_ADAM = dict(lr=2e-4, betas=(0.5, 0.999))    # generator and discriminator     [Radford et al. 2016, DCGAN]
ODIN_TEMPERATURES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)                  # [Liang et al. 2018]
ODIN_EPS = tuple(i * 0.004 / 20 for i in range(21))     # l_inf steps             [Liang et al. 2018]
MAHA_EPS = (0.0, 0.0005, 0.001, 0.0014, 0.002, 0.005, 0.01)     # l_inf steps     [Lee et al. 2018, Mahalanobis]
CALIBRATION_IMAGES = 500   # in-images, and out-images, on which ODIN and Maha choose           [ours]
