#!/bin/sh
# Installs a lock file into an image's /opt/venv and leaves no installer, download cache or compiler behind.
#   install.sh LOCK...
# A build may mount into /run/finetune-build what only its machine has, all of it optional: ca.crt (certificate
# authorities), pip.conf and uv.toml (package index), uv-cache (downloads). None of it ends up in the image.
set -eu
here=/run/finetune-build
if [ -f $here/ca.crt ]; then export SSL_CERT_FILE=$here/ca.crt PIP_CERT=$here/ca.crt; fi
if [ -f $here/pip.conf ]; then export PIP_CONFIG_FILE=$here/pip.conf; fi
if [ -f $here/uv.toml ]; then export UV_CONFIG_FILE=$here/uv.toml; fi
if [ -d $here/uv-cache ]; then export UV_CACHE_DIR=$here/uv-cache; else export UV_NO_CACHE=1; fi
export UV_LINK_MODE=copy PYTHONDONTWRITEBYTECODE=1

installer=$(mktemp -d)
trap 'rm -rf "$installer"' EXIT
python3 -m venv "$installer"
"$installer/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check uv==0.13.9
[ -x /opt/venv/bin/python ] || python3 -m venv --without-pip /opt/venv

touch "$installer/started"
for lock in "$@"; do
    "$installer/bin/uv" pip install --quiet --python /opt/venv/bin/python --no-deps --requirement "$lock"
done

# What only serves to compile extensions or to test the library, none of which happens in a container.
site=$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
find "$site" -name '*.a' -delete
rm -rf "$site"/nvidia/*/include "$site"/nvidia/*/*/include "$site"/torch/include "$site"/torch/test

# Precompiled, because a container with a read-only file system would compile on every start. Only what this call
# installed: a file of a lower layer that is written again is stored twice.
find "$site" /opt/venv/bin -name '*.py' -cnewer "$installer/started" > "$installer/sources" || true
/opt/venv/bin/python -m compileall -q -j 0 -i "$installer/sources" > /dev/null || true  # libraries ship templates that are no valid Python
