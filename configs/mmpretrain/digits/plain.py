# The student of the digits configs, trained on the labels; the config that tests what the others have trained.
#
# ikl data digits
# ikl train mmpretrain/digits/plain.py
_base_ = [
    "../_base_/digits_network.py",
    "../_base_/digits_data.py",
    "../_base_/digits_schedule.py",
    "../_base_/runtime.py",
]

work_dir = "runs/mmpretrain/digits/plain"
