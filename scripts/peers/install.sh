#!/usr/bin/env bash
# A virtual environment of its own for the programs that miles is compared with. CPU builds; run again, it does nothing.
#
#   scripts/peers/install.sh trl           makes .peers/trl: TRL, for versus_trl.py
#   scripts/peers/install.sh algorithms    makes .peers/algorithms: verl, TRL and AReaL beside this repository, for
#                                          tests/algorithms/test_peers.py
set -euo pipefail
cd "$(dirname "$0")/../.."
case ${1:-} in
  trl | algorithms) venv=$(realpath -m ".peers/$1") ;;
  *) echo "usage: $0 trl|algorithms" >&2; exit 2 ;;
esac

if [[ $1 == algorithms ]]; then
  VENV=$venv . scripts/setup.sh
  peers=(verl==0.9.1 trl==1.16.0 areal==1.0.4)
  # Without what they declare, which is far more than their losses need, and pins other versions of transformers. This
  # is what the modules that the tests use import.
  imports=(accelerate==1.15.0 aiofiles aiohttp codetiming colorlog einops flask httptools hydra-core==1.3.8 lark numba
    openai pybase64 ray==2.60.0 swanlab tabulate tenacity tensorboardX tensordict==0.10.0 torchdata==0.11.0 trackio uvloop
    watchfiles websockets)
  stamp="${peers[*]} ${imports[*]}"
  [[ -f $venv/installed && $(<"$venv/installed") == "$stamp" ]] && exit 0
  pip install --quiet --no-deps "${peers[@]}"
  pip install --quiet --constraint constraints.txt "${imports[@]}" 2>/dev/null ||
    pip install --constraint constraints.txt "${imports[@]}"  # again, to show what is wrong
  echo "$stamp" >"$venv/installed"
  exit
fi

packages=(torch==2.13.0 trl==1.16.0)
[[ -f $venv/installed ]] && exit 0
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet "${packages[0]}"      # torch first: what follows must not bring the CUDA build
"$venv/bin/pip" install --quiet "${packages[@]}"
"$venv/bin/pip" freeze > "$venv/installed"
