# The teacher of the distillation configs: the student's network with twice its channels, trained on the labels.
#
# ikl data digits
# ikl train mmpretrain/digits/teacher.py
_base_ = "./plain.py"

model = dict(backbone=dict(stem_channels=16, base_channels=16), head=dict(in_channels=64))

work_dir = "runs/mmpretrain/digits/teacher"  # the distillation configs take its epoch_10.pth
