# shellcheck shell=bash
# What the launch scripts share. A script sets $options (names of --name=value), $switches (names of --name) and their
# defaults, sources this file and calls `parse "$@"`.
dry_run=false

mistake() {
  echo "${0##*/}: $1 (--help lists the options)" >&2
  exit 2
}

# The comment at the head of the script, then its options.
usage() {
  sed -n '/^#SBATCH/d; 2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# Sets a variable for each option, $experiment (module and flags) from what follows --, and $workdir from among them.
parse() {
  # shellcheck disable=SC2154 # the script sets them
  local known=" $options " flags=" $switches dry_run " key argument
  experiment=() workdir=""
  while (($#)); do
    key=${1%%=*} key=${key#--}
    case $1 in
      --help) usage; exit 0 ;;
      --) shift; experiment=("$@"); break ;;
      --?*=?*) [[ $known == *" $key "* ]] || mistake "unknown option $1"; printf -v "$key" %s "${1#*=}" ;;
      --?*) [[ $flags == *" ${1#--} "* ]] || mistake "unknown option, or one without its value: $1"; printf -v "$key" %s true ;;
      *) mistake "options are --name=value, not $1" ;;
    esac
    shift
  done
  [[ ${experiment[0]-} =~ ^experiments\.[a-z_0-9]+$ ]] || mistake "after -- an experiment is expected, such as experiments.sop"
  for argument in "${experiment[@]}"; do
    if [[ $argument == --workdir=?* ]]; then workdir=${argument#*=}; fi
  done
  [[ $workdir ]] || mistake "--workdir=... is missing from the experiment's flags: it is where a run goes on"
  [[ $workdir != *://* ]] || mistake "--workdir=$workdir: expected a path, local or mounted"
}

# under FOLDER: --workdir lies in it.
under() {
  [[ $workdir == "$1"/?* && $workdir/ != */../* ]]
}

# need NAME REGEX EXAMPLE: the option is there and looks right.
need() {
  [[ ${!1} =~ ^($2)$ ]] || mistake "--$1=${!1}: expected something like $3"
}

need_bucket() {
  need bucket '[a-z0-9][-a-z0-9_.]{1,220}[a-z0-9]' my-bucket
}

# Words as a shell reads them.
quote() {
  local word words=() single="'\\''"
  for word; do
    [[ $word =~ ^[[:alnum:]_./:=,@%+~-]+$ ]] || word="'${word//\'/$single}'"
    words+=("$word")
  done
  echo "${words[*]}"
}

# Runs a command; with --dry_run it is printed instead.
run() {
  if $dry_run; then quote "$@"; else "$@"; fi
}

# Runs a command, passing SIGTERM on by `$1` (which finds the process in $child), and returns its exit code when it has ended.
# shellcheck disable=SC2034 # for the script
signalled=false
supervise() {
  local code interrupted=false on_term=$1
  child=""
  shift
  trap 'signalled=true interrupted=true; $on_term' TERM INT
  "$@" &
  child=$!
  while interrupted=false code=0; wait "$child" || code=$?; $interrupted; do :; done
  trap - TERM INT
  return "$code"
}
