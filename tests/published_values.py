"""Distillation settings of the paper and of GKL, typed by hand; tests hold the recipes against them."""

# teacher -> student | lr | IKL alpha / beta (GI off, T2 = 100) | GKL alpha / beta / gamma / GI (T2 = 4)
CIFAR100_TABLE = """
resnet56 -> resnet20 | .05 | 1 / 4 | 1 / 4 / 0.2 / on
resnet110 -> resnet32 | .05 | 1 / 12 | 1 / 4 / 0.1 / off
resnet32x4 -> resnet8x4 | .05 | 1 / 8 | 1 / 16 / 0.05 / on
wrn_40_2 -> wrn_16_2 | .05 | 3 / 12 | 3 / 20 / 0.3 / off
wrn_40_2 -> wrn_40_1 | .05 | 1 / 8 | 1 / 12 / 0.3 / off
vgg13 -> vgg8 | .05 | 1 / 12 | 1 / 8 / 0.2 / on
resnet32x4 -> ShuffleV1 | .01 | 1 / 8 | 1 / 8 / 0.0 / on
wrn_40_2 -> ShuffleV1 | .01 | 1 / 4 | 1 / 8 / 0.0 / off
vgg13 -> MobileNetV2 | .01 | 4 / 12 | 4 / 12 / 0.1 / on
ResNet50 -> MobileNetV2 | .01 | 1 / 12 | 1 / 8 / 0.05 / on
resnet32x4 -> ShuffleV2 | .01 | 3 / 12 | 3 / 12 / 0.1 / on
"""

# teacher -> student | IKL alpha / beta (warm-up 1) | GKL alpha / beta / gamma (warm-up 5); GI on, T2 = 1
IMAGENET_TABLE = """
resnet34 -> resnet18 | 1 / 0.5 | 1 / 0.5 / 0.6
resnet50 -> MobileNetV1 | 4 / 1 | 4 / 1 / 0.5
"""

# teacher -> student | KL | IKL alpha / beta (GI off, T2 = 100) | GKL alpha / beta / gamma (GI on, T2 = 1)
IMAGENET_LT_TABLE = """
resnet18 -> resnet18 | 4.0 | 1 / 0.5 | no script
resnet50 -> resnet50 | 1.0 | 1 / 1 | 1 / 1 / 0.3
resnext101_32x4d -> resnet18 | 4.0 | 4 / 4 | 4 / 4 / 0.3
resnext101_32x4d -> resnet50 | 3.0 | 3 / 4 | 3 / 4 / 0.3
"""

# network of CIFAR-100: trained parameters, state-dict entries
CIFAR100_NETWORKS = {
    "resnet20": (278_324, 128),
    "resnet32": (472_756, 200),
    "resnet56": (861_620, 344),
    "resnet110": (1_736_564, 668),
    "resnet8x4": (1_233_540, 62),
    "resnet32x4": (7_433_860, 206),
    "ResNet50": (23_705_252, 320),
    "wrn_16_2": (703_284, 83),
    "wrn_40_1": (569_780, 226),
    "wrn_40_2": (2_255_156, 227),
    "vgg8": (3_965_028, 37),
    "vgg13": (9_462_180, 72),
    "MobileNetV2": (812_836, 320),
    "ShuffleV1": (949_258, 296),
    "ShuffleV2": (1_355_528, 338),
}
