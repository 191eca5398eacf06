# The network of the adversarial configs, trained on natural images: what an attack does without a robust loss.
#
# ikl data digits
# ikl train mmpretrain/digits/natural.py
_base_ = [
    "../_base_/runtime.py",
    "../_base_/digits_data.py",
    "../_base_/digits_wide_network.py",
    "../_base_/digits_schedule.py",
]

pipeline = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]  # the network takes 32x32, as the files are
train_dataloader = dict(dataset=dict(pipeline=pipeline))
val_dataloader = dict(dataset=dict(pipeline=pipeline))
test_dataloader = dict(dataset=dict(pipeline=pipeline))

work_dir = "runs/mmpretrain/digits/natural"
