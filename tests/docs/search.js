// Search the built site as a browser does, with the site's own search worker: node search.js SITE WORD...
const fs = require("fs")
const vm = require("vm")

const [site, ...words] = process.argv.slice(2)
let listen
let answer
const scope = vm.createContext({
  addEventListener: (_, handler) => (listen = handler),
  postMessage: (message) => answer(message),
  console,
})
scope.self = scope
const folder = `${site}/assets/javascripts/workers`
const [worker] = fs.readdirSync(folder).filter((name) => /^search\..*\.js$/.test(name))
vm.runInContext(fs.readFileSync(`${folder}/${worker}`, "utf8"), scope)

const send = (type, data) => new Promise((resolve) => ((answer = resolve), listen({ data: { type, data } })))

async function main() {
  const index = JSON.parse(fs.readFileSync(`${site}/search/search_index.json`, "utf8"))
  await send(0, { ...index, options: { suggest: true } })
  const found = {}
  for (const word of words) {
    const { data } = await send(2, word)
    found[word] = data.items.map((page) => page.map((entry) => entry.location))
  }
  console.log(JSON.stringify(found))
}

main()
