"""What tests share: golden data, made data, damage, fakes, mounts."""
