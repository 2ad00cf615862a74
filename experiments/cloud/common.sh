# shellcheck shell=bash
# Functions that the launch scripts share. A script sets $options (names of --name=value), $switches (names of
# --name) and their defaults, then sources this file and calls `parse_options "$@"`.
dry_run=false

# usage_error MESSAGE: ends the script with exit code 2.
usage_error() {
  echo "${0##*/}: $1 (--help lists the options)" >&2
  exit 2
}

# Prints the comment at the head of the script.
usage() {
  sed -n '/^#SBATCH/d; 2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# Sets a variable for each option, $experiment to what follows -- (the module and its flags), and $workdir to the
# experiment's --workdir.
parse_options() {
  # shellcheck disable=SC2154 # the script sets $options and $switches
  local known=" $options " flags=" $switches dry_run " key argument
  experiment=() workdir=""
  while (($#)); do
    key=${1%%=*} key=${key#--}
    case $1 in
      --help)
        usage
        exit 0
        ;;
      --)
        shift
        experiment=("$@")
        break
        ;;
      --?*=?*)
        [[ $known == *" $key "* ]] || usage_error "unknown option $1"
        printf -v "$key" %s "${1#*=}"
        ;;
      --?*)
        [[ $flags == *" ${1#--} "* ]] || usage_error "$1: unknown option, or its value is missing"
        printf -v "$key" %s true
        ;;
      *) usage_error "$1: options are written --name=value" ;;
    esac
    shift
  done
  [[ ${experiment[0]-} =~ ^experiments\.[a-z_0-9]+$ ]] ||
    usage_error "expected an experiment after --, such as experiments.sop"
  for argument in "${experiment[@]}"; do
    if [[ $argument == --workdir=?* ]]; then workdir=${argument#*=}; fi
  done
  [[ $workdir ]] ||
    usage_error "the experiment's flags lack --workdir=..., the folder from which an interrupted run resumes"
  [[ $workdir != *://* ]] || usage_error "--workdir=$workdir: expected a path, local or mounted"
}

# workdir_is_under FOLDER: succeeds if --workdir lies in the folder.
workdir_is_under() {
  [[ $workdir == "$1"/?* && $workdir/ != */../* ]]
}

# require NAME REGEX EXAMPLE: ends the script unless the value of the option matches.
require() {
  [[ ${!1} =~ ^($2)$ ]] || usage_error "--$1=${!1}: expected something like $3"
}

require_bucket() {
  require bucket '[a-z0-9][-a-z0-9_.]{1,220}[a-z0-9]' my-bucket
}

# quote WORD...: prints the words as a shell would read them.
quote() {
  local word words=() single="'\\''"
  for word; do
    [[ $word =~ ^[[:alnum:]_./:=,@%+~-]+$ ]] || word="'${word//\'/$single}'"
    words+=("$word")
  done
  echo "${words[*]}"
}

# run COMMAND...: runs the command, or prints it with --dry_run.
run() {
  if $dry_run; then quote "$@"; else "$@"; fi
}

# supervise ON_TERM COMMAND...: runs the command and returns its exit code once it has ended. At SIGTERM or Ctrl-C it
# calls ON_TERM, which finds the process in $child, and sets $signalled.
# shellcheck disable=SC2034 # the script reads it
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
